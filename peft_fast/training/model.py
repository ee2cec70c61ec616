"""The model of `peft-fast train`: what is checked of it before its weights are read, base, quantization, adapter."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..generation.model import ByteCodec, codec_of
from ..jobs.errors import JobError, UsageError
from . import chat as train_chat, fit as train_fit
from .options import Options
from .rows import ByteText, Text, TokenizerText

if TYPE_CHECKING:
    from peft_fast import PeftConfig

TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq-cls": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq-cls": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
HEADS = ("score", "classifier", "classification_head")  # transformers' names


class Plan(NamedTuple):
    """What is known of the model before its weights are read."""

    auto: Any  # the class of transformers that reads it
    config: Any
    text: Text
    pad: int
    max_length: int
    classes: Sequence[str | int]


def plan(options: Options, labels: frozenset[str | int], *, chats: bool = False) -> Plan:
    """Read the model's configuration and tokenizer, and check that the options fit them.

    Raises: UsageError for a directory that is no model of transformers, a model that cannot do the task, target modules
        that it does not have, a length beyond its positions, text that it has no tokens for, packages that are missing.
    """
    _check_packages(options)
    import transformers
    from transformers import AutoConfig, GenerationConfig

    where, directory = f"--model {options.model}", options.model
    if not (directory / "config.json").is_file():
        raise UsageError(f"{where}: expected the directory of a model, with config.json")
    classes = _classes(options.task, labels)
    train_fit.check_same_classes(options, classes)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, **_class_names(classes))
        saved = (directory / "generation_config.json").is_file()
        generation = (
            GenerationConfig.from_pretrained(directory) if saved else GenerationConfig.from_model_config(config)
        )
        codec: Any = codec_of(directory, generation, config.get_text_config().vocab_size)
    except Exception as error:  # transformers raises anything for files that are wrong
        raise UsageError(f"{where}: no model that transformers can read: {_first_line(error)}") from None
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise UsageError(f"{where}: there are no weights in it (model.safetensors)")
    auto = getattr(transformers, _AUTO[options.task])
    if type(config) not in auto._model_mapping or (options.task == "causal-lm" and config.is_encoder_decoder):
        raise UsageError(f"{where}: {config.model_type} has no model for --task {options.task}")
    if options.task == "causal-lm" and train_fit.sees_what_follows(config):
        raise UsageError(
            f"{where}: {config.model_type} is an encoder, its tokens see those behind them: with --task causal-lm it "
            "would learn to copy; use --task seq-cls, or a decoder"
        )
    if codec is None:
        raise UsageError(
            f"{where}: there is no tokenizer in it, and bytes are tokens only where the vocabulary is 256; put the "
            "tokenizer's files beside config.json"
        )
    if chats and (missing := train_chat.what_is_missing(getattr(codec, "tokenizer", None))):
        raise UsageError(f'{where}: for "messages" {missing}')
    end, pad = _end_and_pad(codec, generation, config)
    if options.task == "seq-cls" and config.is_encoder_decoder:
        end, pad = _end_and_pad_of_encoder_decoder(options, config, pad)
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad  # a classifier looks for the last token that is not this one
    text: Text = ByteText(codec, end) if isinstance(codec, ByteCodec) else TokenizerText(codec.tokenizer, end)
    with torch.device("meta"):
        shape = auto.from_config(config)
    train_fit.check_targets(options, shape, peft_config(options))
    return Plan(auto, config, text, pad, train_fit.max_length(options, shape), classes)


def build(options: Options, plan: Plan, device: torch.device) -> tuple[Any, bool]:
    """Base and adapter, ready to be trained; what is random is decided by --seed.

    Returns: (the model, whether the base had a head for other classes).
    Raises: JobError for weights that cannot be loaded; ValueError where the method does not fit the model.
    """
    from peft_fast import prepare_model_for_kbit_training

    torch.manual_seed(options.seed)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    arguments: dict[str, Any] = {}
    if options.quantize != "none":
        place = "cpu" if device.type == "cpu" else device.index or 0  # accelerate compares indices
        arguments = {"quantization_config": quantization(options.quantize, dtype), "device_map": {"": place}}
    directory = options.model.resolve()
    arguments |= {"config": plan.config, "dtype": dtype, "local_files_only": True}
    # a classifier of other classes has a head of another shape, which gives way to a new one
    arguments |= {"ignore_mismatched_sizes": bool(plan.classes), "output_loading_info": True}
    try:
        base, info = plan.auto.from_pretrained(directory, **arguments)
    except Exception as error:
        raise JobError(f"--model {options.model}: {error}") from error
    others = [str(found[0]) for found in info["mismatched_keys"]]
    if body := [name for name in others if name.split(".")[0] not in HEADS]:
        raise JobError(f"--model {options.model}: {body[0]} has not the shape that config.json says")
    if options.quantize == "none":
        base.to(device)
    else:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    if options.gradient_checkpointing:
        _checkpoint(base)
    model = _with_adapter(options, base)
    # what the Trainer asks a quantized model for: that something besides it is trained
    model._hf_peft_config_loaded = True
    return model, bool(others)


def _with_adapter(options: Options, base: Any) -> Any:
    """A new adapter on the base, or --adapter."""
    from peft_fast import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict

    config = peft_config(options)
    if options.adapter is None:
        return get_peft_model(base, config)
    try:
        if not config.is_prompt_learning:
            return PeftModel.from_pretrained(base, options.adapter, config=config, is_trainable=True, strict=True)
        model = get_peft_model(base, config)
        set_peft_model_state_dict(model, load_peft_weights(str(options.adapter)))
        return model
    except Exception as error:  # also what safetensors raises
        raise JobError(f"--adapter {options.adapter}: {error}") from error


def peft_config(options: Options) -> "PeftConfig":
    """Of the method, with the options' values."""
    from peft_fast import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    if options.adapter is not None:
        saved: PeftConfig = PeftConfig.from_pretrained(options.adapter)
        saved.task_type, saved.inference_mode = saved.task_type or TASK_TYPES[options.task], False
        return saved
    task = TASK_TYPES[options.task]
    if options.method == "lora":
        targets = options.target_modules
        return LoraConfig(
            r=options.r or 0,
            lora_alpha=options.lora_alpha or 0,
            lora_dropout=options.lora_dropout or 0.0,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            task_type=task,
        )
    kinds: dict[str, Any] = {
        "prefix": PrefixTuningConfig,
        "prompt": PromptTuningConfig,
        "p-tuning": PromptEncoderConfig,
    }
    config: PeftConfig = kinds[options.method](num_virtual_tokens=options.num_virtual_tokens, task_type=task)
    return config


def takes_one_row(options: Options, base: Any) -> bool:
    """Whether rows of different lengths cannot share a batch.

    A classifier on a decoder looks at the last token that is no padding. Behind learned tokens it gets embeddings, in
    which padding does not show: it would look at the last place, and padding on the left would move the text away from
    the learned tokens.
    """
    return options.task == "seq-cls" and options.method in ("prompt", "p-tuning") and hasattr(base, "score")


def _checkpoint(base: Any) -> None:
    """Recompute activations in the backward pass; needs no gradient at the input."""
    settings = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):  # the name since transformers 5.23
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def quantization(name: str, compute: torch.dtype) -> Any:
    """transformers' configuration for what --quantize names."""
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind, _, double = name.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=compute,
    )


def _check_packages(options: Options) -> None:
    if find_spec("accelerate") is None:
        raise UsageError('training needs accelerate, which is not installed: pip install "peft_fast[train]"')
    if options.quantize != "none" and find_spec("bitsandbytes") is None:
        raise UsageError(f"--quantize {options.quantize} needs bitsandbytes: pip install bitsandbytes")


def _classes(task: str, labels: frozenset[str | int]) -> Sequence[str | int]:
    """The labels in the order of their classes."""
    if task != "seq-cls":
        return ()
    classes = sorted(labels, key=lambda label: (str(type(label)), label))
    if len(classes) < 2:
        raise UsageError(f"--data: every line has the label {classes[0]!r}; a classifier needs two different ones")
    return classes


def _class_names(classes: Sequence[str | int]) -> dict[str, Any]:
    if not classes:
        return {}
    names = [str(label) for label in classes]
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def _end_and_pad(codec: Any, generation: Any, config: Any) -> tuple[int | None, int]:
    """(the token that ends a text, the token that fills a row up); any token can be that, it is masked."""
    tokenizer = getattr(codec, "tokenizer", None)
    ends = getattr(tokenizer, "eos_token_id", None) if tokenizer is not None else generation.eos_token_id
    end = ends[0] if isinstance(ends, list | tuple) else ends
    own = getattr(tokenizer, "pad_token_id", None)
    pads = [own, config.get_text_config().pad_token_id, generation.pad_token_id, end, 0]
    return end, next(pad for pad in pads if pad is not None)


def _end_and_pad_of_encoder_decoder(options: Options, config: Any, pad: int) -> tuple[int, int]:
    """For its classifier, which looks at the end token: every row has one, and what fills rows up is another token."""
    where, end = f"--model {options.model}", config.eos_token_id
    if not isinstance(end, int):
        raise UsageError(
            f"{where}: its config.json names no end token (eos_token_id), at which the classifier of "
            f"{config.model_type} looks"
        )
    if options.method in ("prompt", "p-tuning"):
        raise UsageError(
            f"--method {options.method}: the classifier of {config.model_type} finds its end token by its number, and "
            "learned tokens have none; use --method lora or prefix"
        )
    return end, pad if pad != end else int(end == 0)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
