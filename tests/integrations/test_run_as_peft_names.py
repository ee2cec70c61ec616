"""What libraries that train with adapters look up in peft and nobody else does: equal to peft's."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.other import fsdp_auto_wrap_policy as pefts_policy
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping as pefts_mapping
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

import peft_fast
from peft_fast.utils import _gather
from peft_fast.utils.other import fsdp_auto_wrap_policy
from peft_fast.utils.save_and_load import get_peft_model_state_dict
from peft_fast.utils.transformers_weight_conversion import build_peft_weight_mapping


def model(library: Any, prefix: bool = False) -> Any:
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    if prefix:
        config = library.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    else:
        config = library.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return library.get_peft_model(base, config)


@pytest.mark.parametrize("prefix", [False, True])
def test_fsdp_wraps_the_same_modules(prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def units(library: Any, policy_of: Any) -> list[str]:
        whole = model(library, prefix)
        policy = policy_of(whole)
        modules = whole.named_modules()
        return sorted(name for name, one in modules if policy(module=one, recurse=False, nonwrapped_numel=0))

    expected = units(peft, pefts_policy)
    assert units(peft_fast, fsdp_auto_wrap_policy) == expected and any("layers.1" in name for name in expected)
    assert ("prompt_encoder.default" in expected) == prefix
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,Nope")
    with pytest.raises(TypeError, match="Could not find the transformer layer class to wrap in the model: Nope"):
        units(peft_fast, fsdp_auto_wrap_policy)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    assert units(peft_fast, fsdp_auto_wrap_policy) == units(peft, pefts_policy) != expected


def test_names_for_transformers_loader() -> None:
    rules = get_model_conversion_mapping(model(peft_fast).get_base_model())
    assert rules and build_peft_weight_mapping(None, "x") == pefts_mapping(None, "x") == []
    config = {library: library.LoraConfig() for library in (peft, peft_fast)}
    ours = build_peft_weight_mapping(rules, "an.adapter", peft_config=config[peft_fast])
    theirs = [r for r in pefts_mapping(rules, "an.adapter", peft_config=config[peft]) if isinstance(r, WeightRenaming)]
    assert [(r.source_patterns, r.target_patterns) for r in ours] == [
        (r.source_patterns, r.target_patterns) for r in theirs
    ]


class Part:
    """A tensor that is sharded over two ranks, as far as a roll call looks at it."""

    class device_mesh:
        mesh = torch.tensor([0, 1])

    def full_tensor(self) -> torch.Tensor:
        return torch.ones(2, 2)


def test_a_roll_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that does not come is named; the one that came too early can go on at the next call."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        monkeypatch.setenv(_gather.TIMEOUT_VARIABLE, "0.2")
        monkeypatch.setattr(_gather, "_gathers", type(_gather._gathers)())
        lora = model(peft_fast)
        state = {key: Part() if "lora_A" in key else value for key, value in lora.state_dict().items()}
        with pytest.raises(
            RuntimeError, match=r"'default' is sharded over ranks \[0, 1\].* 0\.2 s for \[1\].*all ranks"
        ):
            get_peft_model_state_dict(lora, state)
        store.set("peft_fast/gather/(0, 1)/0/1", "here")
        tensors = get_peft_model_state_dict(lora, state)
        assert {tuple(value.shape) for key, value in tensors.items() if "lora_A" in key} == {(2, 2)}
        store.set("peft_fast/gather/(0, 1)/1/1", "here")
        get_peft_model_state_dict(lora, state)
        with pytest.raises(RuntimeError, match="all ranks"):
            get_peft_model_state_dict(lora, state)
        get_peft_model_state_dict(lora)  # whole tensors need nobody
    finally:
        torch.distributed.destroy_process_group()
