"""The model of `peft-fast generate`: base, adapters and the way from text to tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..jobs.errors import JobError, UsageError
from .requests import Codec

BYTES = 256  # a vocabulary of this size, without tokenizer files, is taken as bytes
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json",
)  # fmt: skip


class Generator(NamedTuple):
    """A model that is ready, and what has to be known about it."""

    model: Any  # PeftModel, or transformers' own model where there are no adapters
    adapters: tuple[str, ...]
    virtual_tokens: Mapping[str, int]  # of the adapters that are prefixes
    codec: Codec | None
    config: Any  # transformers' GenerationConfig of the model
    device: torch.device
    encoder_decoder: bool
    vocab_size: int
    positions: int | None
    pad: int


class TokenizerCodec:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """With the tokenizer's special tokens; no chat template."""
        tokens: list[int] = self.tokenizer(text).input_ids
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Without special tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class ByteCodec:
    """Bytes are tokens, as in the demo's base model; a prompt begins with the model's first token, if it has one."""

    def __init__(self, first: int | None, special: frozenset[int]) -> None:
        self.first, self.special = first, special

    def encode(self, text: str) -> list[int]:
        """UTF-8."""
        return [*([] if self.first is None else [self.first]), *text.encode()]

    def decode(self, tokens: list[int]) -> str:
        """UTF-8; a character that is not whole becomes U+FFFD."""
        return bytes(token for token in tokens if token not in self.special).decode(errors="replace")


def load(directory: Path, adapters: Mapping[str, Path], device: torch.device, dtype: str) -> Generator:
    """Load the base model and put every adapter on it.

    Args:
        dtype: "auto" (that of the file), "float32", "bfloat16", "float16".
    Raises: JobError, naming the directory, for a model or an adapter that cannot be loaded, with the reason.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ordered = _in_loading_order(adapters)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        encoder_decoder = bool(config.is_encoder_decoder)
        auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        base = auto.from_pretrained(directory, dtype=dtype, local_files_only=True).to(device).eval()
        codec = codec_of(directory, base.generation_config, config.get_text_config().vocab_size)
    except Exception as error:  # transformers raises anything for files that are wrong
        raise JobError(f"--model {directory}: {error}") from error
    model = _with_adapters(base, ordered)
    text_config = config.get_text_config(decoder=True)
    return Generator(
        model,
        tuple(adapters),
        _virtual_tokens(model),
        codec,
        base.generation_config,
        device,
        encoder_decoder,
        base.get_input_embeddings().num_embeddings,
        getattr(text_config, "max_position_embeddings", None),
        _pad(base.generation_config),
    )


def adapters_of(named: Sequence[str], directory: Path | None) -> dict[str, Path]:
    """Name -> directory, of NAME=DIR and of every adapter in `directory`.

    Raises: UsageError for what is not NAME=DIR, a name that no adapter can have or that comes twice, and a directory
        that has no adapter in it.
    """
    from ..checkpoint import CONFIG_NAME, check_adapter_name, locate

    pairs = []
    for text in named:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise UsageError(f"--adapters {text}: expected NAME=DIR, as in email=adapters/email")
        if not Path(folder).is_dir() or locate(folder, CONFIG_NAME) is None:
            raise UsageError(f"--adapters {text}: there is no adapter in {folder} (a directory with {CONFIG_NAME})")
        pairs.append((name, Path(folder)))
    if directory is not None:
        if not directory.is_dir():
            raise UsageError(f"--adapters-dir {directory}: there is no such directory")
        found = [path for path in sorted(directory.iterdir()) if path.is_dir() and locate(path, CONFIG_NAME)]
        if not found:
            own = (
                f"it is one itself: --adapters NAME={directory}" if locate(directory, CONFIG_NAME) else "none is there"
            )
            raise UsageError(f"--adapters-dir {directory}: expected sub-directories with {CONFIG_NAME}; {own}")
        pairs.extend((path.name, path) for path in found)
    adapters: dict[str, Path] = {}
    for name, path in pairs:
        if name in adapters:
            raise UsageError(f"two adapters have the name {name!r}, {adapters[name]} and {path}: rename one, NAME=DIR")
        try:
            check_adapter_name(name)
            if name == "__base__":
                raise ValueError("the name '__base__' means the model without an adapter")
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from None
        adapters[name] = path
    return adapters


def _in_loading_order(adapters: Mapping[str, Path]) -> dict[str, Path]:
    """LoRA first: a model of LoRA takes prefixes, one of prefixes takes no LoRA.

    Raises: JobError for an adapter whose configuration cannot be read, or whose method has no mixed batches.
    """
    from peft_fast import PeftConfig

    prefixes = set()
    for name, path in adapters.items():
        try:
            config = PeftConfig.from_pretrained(path)
        except Exception as error:  # whatever a file can have in it
            raise JobError(f"adapter {name}, {path}: {error}") from error
        if config.peft_type == "PREFIX_TUNING":
            prefixes.add(name)
        elif config.is_prompt_learning:
            method = getattr(config.peft_type, "value", config.peft_type)
            raise JobError(
                f"adapter {name}, {path}: {method} has no mixed batches, its learned tokens make every row longer; "
                "leave this adapter out (prefix tuning can be mixed), or use it alone: AutoPeftModelForCausalLM or "
                "AutoPeftModelForSeq2SeqLM, .from_pretrained(directory), .generate(...)"
            )
    return dict(sorted(adapters.items(), key=lambda item: item[0] in prefixes))


def _virtual_tokens(model: Any) -> dict[str, int]:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    return {name: config.num_virtual_tokens for name, config in configs.items() if config.is_prompt_learning}


def _with_adapters(base: Any, adapters: Mapping[str, Path]) -> Any:
    from peft_fast import PeftConfig, PeftModel

    model = base
    for name, path in adapters.items():
        try:
            if model is base:
                model = PeftModel.from_pretrained(base, path, adapter_name=name, strict=True)
            else:
                model.load_adapter(path, adapter_name=name, strict=True)
        except Exception as error:  # also what safetensors and pickle raise
            made_for = PeftConfig.from_pretrained(path).base_model_name_or_path
            raise JobError(f"adapter {name}, {path}: {error} (it says that it is for {made_for})") from error
    brought = getattr(model, "_brought_weights", {})
    if brought and len(adapters) > 1:
        name = next(iter(brought))
        raise JobError(
            f"adapter {name}, {adapters[name]}: its file has weights of the base model "
            f"({', '.join(brought[name][:2])}), which would change the answers of the other adapters and of the base: "
            "answer its requests in a run of their own"
        )
    model.eval()
    return model


def codec_of(directory: Path, generation_config: Any, vocab_size: int) -> Codec | None:
    """The tokenizer in a model's directory; bytes in its place if the vocabulary is theirs; None if it is not.

    Args:
        generation_config: of the model, for its special tokens.
    """
    if any((directory / name).is_file() for name in _TOKENIZER_FILES):
        from transformers import AutoTokenizer

        return TokenizerCodec(AutoTokenizer.from_pretrained(directory, local_files_only=True))
    if vocab_size != BYTES:  # more tokens than bytes: which is which cannot be known
        return None
    first = generation_config.bos_token_id
    special = {first, *_ids(generation_config.eos_token_id), *_ids(generation_config.pad_token_id)} - {None}
    return ByteCodec(first, frozenset(special))


def _pad(generation_config: Any) -> int:
    """Any token does: what it stands for is masked on the way in and cut off on the way out."""
    ids = [*_ids(generation_config.pad_token_id), *_ids(generation_config.eos_token_id), 0]
    return int(ids[0])


def _ids(value: Any) -> list[int]:
    """A token id of a config, which may be missing, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
