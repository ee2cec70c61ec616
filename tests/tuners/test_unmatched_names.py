"""Names in a configuration that are not in the model are said by name, with the nearest that are."""

import warnings
from typing import Any

import pytest
import transformers

from peft_fast import LoraConfig, get_peft_model

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def llama(kind: Any = transformers.LlamaForCausalLM) -> Any:
    return kind(transformers.LlamaConfig(**SIZES, pad_token_id=0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(target_modules=["q_proj", "v_porj"]), r"target_modules: no module .* 'v_porj' .did you mean 'v_proj'"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_haed"]), r"modules_to_save: .*'lm_haed' .*'lm_head'"),
        (dict(target_modules=["q_proj"], layers_to_transform=[0, 7]), "no target module is in a layer 7"),
        (dict(target_modules=["q_proj"], rank_pattern={"k_proj": 4}), r"rank_pattern keys .*k_proj"),
        (dict(target_modules=["q_proj"], alpha_pattern={"xyz": 4}), r"alpha_pattern keys .*xyz"),
        (dict(target_modules=["q_proj"], exclude_modules=["v_prj"]), "no modules were excluded"),
    ],
    ids=str,
)
def test_it_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.warns((UserWarning, RuntimeWarning), match=said):
        get_peft_model(llama(), LoraConfig(r=2, **options))


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "self_attn.v_proj", "model.layers.1.mlp.up_proj"]),
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"]),
        dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    ],
    ids=str,
)
def test_nothing_is_said_where_all_are_there(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(llama(), LoraConfig(r=2, **options))
        model.add_adapter("second", LoraConfig(r=2, **options))


def test_the_usual_heads_are_not_missed() -> None:
    """PEFT adds "classifier" and "score"; a model has one of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(llama(transformers.LlamaForSequenceClassification), LoraConfig(r=2, task_type="SEQ_CLS"))
