"""The modules that make virtual tokens, bit for bit those of the installed peft: initial values, outputs, gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peft_fast
from peft_fast.tuners.tuners_utils import BasePromptEncoder
from peft_fast.utils.peft_types import PeftType

SIZES = {"num_virtual_tokens": 5, "token_dim": 12, "num_attention_heads": 3, "num_layers": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix_zero": ("PrefixTuningConfig", {"init_weights": "zero"}),
    "prefix_mlp": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 7}),
    "prefix_mlp_zero": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 7, "init_weights": "zero"},
    ),
    "prompt": ("PromptTuningConfig", {}),
    "prompt_vocabulary": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p_mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 7}),
    "p_lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM"}),
    "p_lstm_deep": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3},
    ),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "multitask_vocabulary": (
        "MultitaskPromptTuningConfig",
        {"num_tasks": 2, "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
}


def words(dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(5)
    return nn.Embedding(40, SIZES["token_dim"], dtype=dtype)


def make(library: Any, name: str, settings: dict[str, Any], embeddings: nn.Embedding | None = None) -> Any:
    """The encoder of a configuration, from the same random numbers every time."""
    config = getattr(library, name)(**{**SIZES, "num_transformer_submodules": 1, **settings})
    mapping = (peft if library is peft else peft_fast.mapping).PEFT_TYPE_TO_TUNER_MAPPING
    needs_words = config.peft_type in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")
    embeddings = words() if embeddings is None else embeddings
    torch.manual_seed(7)
    cls = mapping[config.peft_type if library is peft else PeftType(config.peft_type)]
    return cls(config, embeddings) if needs_words else cls(config)


def inputs(encoder: Any, rows: int = 2) -> tuple[Tensor, ...]:
    indices = torch.arange(encoder.embedding.num_embeddings).expand(rows, -1)
    if hasattr(encoder, "prefix_task_cols"):
        return indices, torch.randint(0, encoder.num_tasks, (rows,), generator=torch.Generator().manual_seed(1))
    return (indices,)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return KINDS[request.param]


@pytest.mark.parametrize("submodules", [1, 2])
def test_values_outputs_and_gradients_are_pefts(kind: tuple[str, dict[str, Any]], submodules: int) -> None:
    name, settings = kind
    theirs, ours = (
        make(lib, name, {**settings, "num_transformer_submodules": submodules}) for lib in (peft, peft_fast)
    )
    assert isinstance(ours, BasePromptEncoder)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert value.dtype == ours.state_dict()[key].dtype and torch.equal(value, ours.state_dict()[key]), key
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    outputs = [encoder(*inputs(encoder)) for encoder in (theirs, ours)]
    assert torch.equal(*outputs)
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    for (key, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key


def test_in_inference_mode_there_is_only_what_a_file_has(kind: tuple[str, dict[str, Any]]) -> None:
    name, settings = kind
    encoder = make(peft_fast, name, {**settings, "inference_mode": True})
    theirs = make(peft, name, {**settings, "inference_mode": True})
    assert list(encoder.state_dict()) == list(theirs.state_dict()) and not encoder.is_reparameterized
    assert encoder.embedding.weight.shape == theirs.embedding.weight.shape
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    if name != "MultitaskPromptTuningConfig":  # peft's fails where the configuration speaks of a network
        assert torch.equal(encoder(*inputs(encoder, 1))[0], encoder.embedding.weight)
    values = torch.randn_like(encoder.embedding.weight)
    encoder.load_prompt_embeddings(values)
    assert torch.equal(encoder.embedding.weight, values) and torch.equal(encoder.prompt_embeddings(), values)


def test_what_is_saved_is_what_the_network_gives(kind: tuple[str, dict[str, Any]]) -> None:
    name, settings = kind
    encoder = make(peft_fast, name, settings)
    saved = encoder.prompt_embeddings()
    expected = encoder.embedding.weight
    if encoder.is_reparameterized:
        expected = encoder.eval()(*inputs(encoder, 1))[0]
    assert torch.equal(saved, expected) and not saved.requires_grad
    given = {key: value + 1 for key, value in encoder.state_dict().items()}
    other = copy.deepcopy(encoder)
    other.load_state_dict(given)
    assert torch.equal(encoder.prompt_embeddings(given), other.prompt_embeddings())
    assert torch.equal(encoder.prompt_embeddings(), saved)


def test_dropout_does_not_reach_the_file() -> None:
    """peft saves what a call in the model's mode gives: other numbers at each save."""
    settings = {**KINDS["p_lstm_deep"][1], "encoder_dropout": 0.5}
    encoder = make(peft_fast, "PromptEncoderConfig", settings).train()
    assert not torch.equal(encoder(*inputs(encoder)), encoder(*inputs(encoder)))
    saved = encoder.prompt_embeddings()
    assert torch.equal(saved, encoder.prompt_embeddings()) and encoder.training and encoder.lstm_head.training
    assert torch.equal(saved, encoder.eval()(*inputs(encoder, 1))[0])


def test_loading_refuses_what_it_cannot_do() -> None:
    for kind in ("prefix_mlp", "p_mlp", "p_lstm"):
        encoder = make(peft_fast, *KINDS[kind])
        with pytest.raises(ValueError, match="holds what comes out of it: load it under another name"):
            encoder.load_prompt_embeddings(torch.zeros(encoder.prompt_embeddings().shape))
    for library in (peft, peft_fast):
        encoder = make(library, *KINDS["prefix_mlp"])
        with pytest.raises(ValueError, match="Cannot load flattened prompt embeddings when `prefix_projection=True`"):
            encoder.load_prompt_embeddings(torch.zeros(5, 48))
        encoder = make(library, *KINDS["prefix"])
        with pytest.raises(ValueError, match=r"Invalid `prompt_embeddings` shape. Expected \(5, 48\), got \(4, 48\)."):
            encoder.load_prompt_embeddings(torch.zeros(4, 48))


def test_choices_that_do_not_exist() -> None:
    for name, settings, message in (
        ("PrefixTuningConfig", {"init_weights": "one"}, "expected None or 'zero'"),
        ("PromptTuningConfig", {"prompt_tuning_init": "text"}, "expected one of TEXT, SAMPLE_VOCAB, RANDOM"),
        ("MultitaskPromptTuningConfig", {"prompt_tuning_init": "NONE"}, "expected one of TEXT, RANDOM, AVERAGE_SOURCE"),
        ("PromptEncoderConfig", {"encoder_reparameterization_type": "GRU"}, "use one of MLP .recommended. or LSTM"),
    ):
        with pytest.raises(ValueError, match=message):
            make(peft_fast, name, settings)
        make(peft_fast, name, {**settings, "inference_mode": True})  # what it started as does not matter any more
    for library in (peft, peft_fast):
        with pytest.raises(ValueError, match="task_ids cannot be None"):
            encoder = make(library, *KINDS["multitask"])
            encoder(inputs(encoder)[0], None)


def test_layers_that_an_mlp_does_not_have() -> None:
    for library in (peft, peft_fast):
        kind = library.PromptEncoderReparameterizationType.MLP
        with pytest.warns(UserWarning, match="for MLP, the argument `encoder_num_layers` is ignored. Exactly 2 MLP"):
            make(
                library,
                "PromptEncoderConfig",
                {**KINDS["p_mlp"][1], "encoder_num_layers": 3, "encoder_reparameterization_type": kind},
            )


# --------------------------------------------------------------------------------------------------- text to start from
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a tokenizer that splits at spaces."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate("? good bad fine so very".split())}, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("text", ["good", "good bad", "so very good fine bad", "so very very very good fine bad so so"])
@pytest.mark.parametrize("name", ["PromptTuningConfig", "MultitaskPromptTuningConfig"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_to_start_from(name: str, text: str, tokenizer: str, dtype: torch.dtype) -> None:
    settings = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": tokenizer,
        "num_transformer_submodules": 2,
    }
    theirs, ours = (make(lib, name, settings, words(dtype)) for lib in (peft, peft_fast))
    for key, value in theirs.state_dict().items():
        assert value.dtype == ours.state_dict()[key].dtype and torch.equal(value, ours.state_dict()[key]), key
    assert ours.embedding.weight.dtype == torch.float32 and ours.embedding.weight.requires_grad


def test_text_without_a_token(tokenizer: str) -> None:
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "", "tokenizer_name_or_path": tokenizer}
    with pytest.raises(ValueError, match="has no token to start from"):
        make(peft_fast, "PromptTuningConfig", settings)


def test_no_code_runs_for_a_tokenizer(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trust_remote_code` in a configuration, which may come from anywhere, does not reach transformers."""
    import transformers

    seen: list[dict[str, Any]] = []
    original = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda path, **kw: (seen.append(kw), original(path, **kw))[1]
    )
    settings: dict[str, Any] = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "good",
        "tokenizer_name_or_path": tokenizer,
        "tokenizer_kwargs": {"trust_remote_code": True, "use_fast": True},
    }
    make(peft_fast, "PromptTuningConfig", copy.deepcopy(settings))
    assert seen == [{"use_fast": True}]
    make(peft_fast, "PromptTuningConfig", {**settings, "inference_mode": True})
    assert len(seen) == 1


# ---------------------------------------------------------------------------------------- earlier training as the start
@pytest.mark.parametrize("file", ["source.safetensors", "source.bin"])
@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_earlier_training_to_start_from(init: str, file: str, tmp_path: Path) -> None:
    path = str(tmp_path / file)
    source = {
        "prefix_task_cols": torch.randn(4, 5, 2),
        "prefix_task_rows": torch.randn(4, 2, 12),
        "prompt_embeddings": torch.randn(5, 12),
    }
    save_file(source, path) if file.endswith("safetensors") else torch.save(source, path)
    settings = {
        "num_ranks": 2, "prompt_tuning_init": init, "prompt_tuning_init_state_dict_path": path,
        "prompt_tuning_init_task": 2,
    }  # fmt: skip
    theirs, ours = (make(lib, "MultitaskPromptTuningConfig", settings) for lib in (peft, peft_fast))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    for library in (peft, peft_fast):
        with pytest.raises(RuntimeError, match="size mismatch"):
            make(library, "MultitaskPromptTuningConfig", {**settings, "token_dim": 10})
    Path(path).unlink()
    make(peft_fast, "MultitaskPromptTuningConfig", {**settings, "inference_mode": True})  # does not look


def test_earlier_training_that_cannot_be_used(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "num_ranks": 2}
    for library in (peft, peft_fast):
        with pytest.raises(ValueError, match="prompt_tuning_init_state_dict_path needs to be specified with"):
            make(library, "MultitaskPromptTuningConfig", settings)
    path = tmp_path / "source.safetensors"
    settings["prompt_tuning_init_state_dict_path"] = str(path)
    save_file({"prompt_embeddings": torch.randn(5, 12), "prefix_task_cols": torch.randn(4, 5, 2)}, path)
    with pytest.raises(ValueError, match="found no prefix_task_rows"):
        make(peft_fast, "MultitaskPromptTuningConfig", settings)
    rows = {"prefix_task_rows": torch.randn(4, 2, 12)}
    save_file({"prompt_embeddings": torch.randn(5, 12), "prefix_task_cols": torch.randn(4, 5, 2), **rows}, path)
    with pytest.raises(ValueError, match="there is no task 4"):
        make(peft_fast, "MultitaskPromptTuningConfig", {**settings, "prompt_tuning_init_task": 4})
    pickled = tmp_path / "source.bin"
    torch.save({"prompt_embeddings": BasePromptEncoder}, pickled)
    with pytest.raises(ValueError, match="weights_only"), pytest.warns(UserWarning, match="is a pickle"):
        make(peft_fast, "MultitaskPromptTuningConfig", {**settings, "prompt_tuning_init_state_dict_path": str(pickled)})
