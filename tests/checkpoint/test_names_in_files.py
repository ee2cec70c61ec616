"""Names in adapter files that are not as PEFT writes them today, and what a file says that does not fit."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_fast

TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28,
              patch_size=14)  # fmt: skip
IDS = torch.arange(4, 10)[None]
LEVEL = ("base_model.model.", "base_model.model._orig_mod.")  # what torch.compile adds


def llama(name: str = "") -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()
    model.name_or_path = name
    return model


def llava() -> Any:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=3,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def gemma3() -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_index=3, mm_tokens_per_image=4,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def saved(base: nn.Module, directory: Path, **options: Any) -> Any:
    """A model with an adapter that is not zero, saved."""
    config = peft_fast.LoraConfig(**{"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **options})
    model = peft_fast.get_peft_model(base, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return model


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    file = directory / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file)
    return tensors


def before_4_52(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers named these layers until then."""
    changes = {
        "base_model.model.model.language_model.": "base_model.model.language_model.model.",
        "base_model.model.lm_head": "base_model.model.language_model.lm_head",
        "base_model.model.model.vision_tower": "base_model.model.vision_tower",
    }
    found = {}
    for name, tensor in tensors.items():
        old = next((old for new, old in changes.items() if name.startswith(new)), None)
        new = next((new for new in changes if name.startswith(new)), "")
        found[name.replace(new, old) if old else name] = tensor
    return found


@pytest.mark.parametrize("make", [llava, gemma3])
@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "state dict"])
def test_layers_that_transformers_renamed(make: Callable[[], Any], way: str, tmp_path: Path) -> None:
    model = saved(make(), tmp_path, target_modules=["q_proj", "lm_head"] if make is llava else ["q_proj"])
    tensors = rewrite(tmp_path, before_4_52)
    assert any(name.startswith("base_model.model.language_model.model.") for name in tensors)
    expected = model(input_ids=IDS).logits
    if way == "from_pretrained":
        again = peft_fast.PeftModel.from_pretrained(make(), tmp_path)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
        assert torch.allclose(theirs(input_ids=IDS).logits, expected, atol=1e-5), "the premise: peft loads it"
    else:
        again = peft_fast.get_peft_model(make(), model.peft_config["default"], adapter_name="other")
        if way == "load_adapter":
            again.load_adapter(tmp_path, "default")
        else:
            again.add_adapter("default", model.peft_config["default"])
            assert not peft_fast.set_peft_model_state_dict(again, tensors, "default").unexpected_keys
        again.set_adapter("default")
    assert torch.allclose(again.eval()(input_ids=IDS).logits, expected, atol=1e-6)


def test_a_key_with_the_adapters_name(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path, target_modules=["q_proj", "embed_tokens"])
    names = {".lora_A.": ".lora_A.default.", ".lora_B.": ".lora_B.other.", "lora_embedding_A": "lora_embedding_A.x"}

    def renamed(name: str) -> str:
        for new, old in names.items():
            name = name.replace(new, old)
        return name

    rewrite(tmp_path, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    again = peft_fast.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    rewrite(tmp_path, lambda tensors: tensors | {n.replace(".default", ""): t.clone() for n, t in tensors.items()})
    with pytest.raises(ValueError, match="the same name"):
        peft_fast.PeftModel.from_pretrained(llama(), tmp_path)


def test_a_compiled_base_writes_plain_names_and_reads_both(tmp_path: Path) -> None:
    model = saved(torch.compile(llama()), tmp_path, modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("_orig_mod" in name for name in tensors)
    expected = model.base_model.model._orig_mod(IDS).logits
    for _ in range(2):
        again = peft_fast.PeftModel.from_pretrained(llama(), tmp_path)
        assert torch.equal(again(IDS).logits, expected)
        compiled = peft_fast.PeftModel.from_pretrained(torch.compile(llama()), tmp_path)
        found = peft_fast.get_peft_model_state_dict(compiled)
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
        rewrite(
            tmp_path,
            lambda old: {n.replace("base_model.model.", "base_model.model._orig_mod."): t for n, t in old.items()},
        )


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_weights_of_8_bits_are_their_own_numbers_and_it_is_said(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = saved(llama(), tmp_path)
    narrow = rewrite(tmp_path, lambda tensors: {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()})
    with pytest.warns(UserWarning, match="4 tensors have 8 bits .*read as float32"):
        again = peft_fast.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    peft_fast.set_peft_model_state_dict(model, {name: tensor.float() for name, tensor in narrow.items()})
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_a_method_that_is_not_known(tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "NOSUCH"}))
    for load in (
        lambda: peft_fast.PeftConfig.from_pretrained(tmp_path),
        lambda: peft_fast.PeftModel.from_pretrained(llama(), tmp_path),
        lambda: peft_fast.get_peft_config({"peft_type": "NOSUCH"}),
    ):
        with pytest.raises(ValueError, match="peft_type 'NOSUCH' is not known") as raised:
            load()
        assert isinstance(raised.value, KeyError), "as in PEFT"


def test_a_base_of_another_name_is_said(tmp_path: Path) -> None:
    saved(llama("organisation/base"), tmp_path)
    with pytest.warns(UserWarning, match="made for the base model 'organisation/base', and is loaded onto 'x/other'"):
        peft_fast.PeftModel.from_pretrained(llama("x/other"), tmp_path)
    model = peft_fast.get_peft_model(llama("x/other"), peft_fast.LoraConfig(target_modules=["v_proj"]))
    with pytest.warns(UserWarning, match="loaded onto 'x/other'"):
        model.load_adapter(tmp_path, "second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in ("base", "/models/Base", "/cache/models--organisation--base/snapshots/0123", ""):
            peft_fast.PeftModel.from_pretrained(llama(same), tmp_path)


def test_an_adapter_without_its_second_factor_does_nothing_and_it_is_said(tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora_A" in name})
    with pytest.warns(UserWarning, match="No lora_B is in the file: the adapter changes nothing"):
        peft_fast.PeftModel.from_pretrained(llama(), tmp_path)


def test_a_message_has_an_end(tmp_path: Path) -> None:
    """A list of names of a large model is no message."""
    layers = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in range(2000)})
    config = peft_fast.LoraConfig(target_modules=[f"nothing{i}" for i in range(3000)])
    with pytest.raises(ValueError, match="not found in the base model") as raised:
        peft_fast.inject_adapter_in_model(config, layers)
    assert len(str(raised.value)) < 3000
    model = peft_fast.PeftModel(nn.Sequential(layers), peft_fast.LoraConfig(target_modules=r".*layer\d+"))
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: dict(list(tensors.items())[:2]))
    with pytest.warns(UserWarning, match="and 3993 more") as caught:
        peft_fast.PeftModel.from_pretrained(nn.Sequential(nn.ModuleDict(layers)), tmp_path)
    assert all(len(str(warning.message)) < 3000 for warning in caught)
