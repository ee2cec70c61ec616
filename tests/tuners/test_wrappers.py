"""`ModulesToSaveWrapper` and the helpers around it, beside the installed peft's."""

import copy
import pickle
import warnings
from typing import Any

import peft.utils.other as theirs
import pytest
import torch
from torch import nn

from peft_fast.tuners.lora import LoraConfig, LoraModel
from peft_fast.utils import other as ours


class Head(nn.Module):
    """A head with a parameter of its own, a buffer and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.rand(4))
        self.size = 4

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        return self.norm(self.dense(x)) * self.scale * (2 if twice else 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = Head()
        self.sub_head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sub_head(self.head(self.body(x)))


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def both_wrapped(*names: str) -> tuple[Any, Any]:
    """Wrappers of equal heads with equal random copies for these adapters: (peft's, ours)."""
    head = Head().eval()
    wrappers = []
    for library in (theirs, ours):
        wrapper = library.ModulesToSaveWrapper(copy.deepcopy(head), names[0])
        for name in names[1:]:
            wrapper.update(name)
        wrapper.set_adapter(names[0])
        wrappers.append(wrapper)
    for name in names:
        randomize(wrappers[1].modules_to_save[name])
        wrappers[0].modules_to_save[name].load_state_dict(wrappers[1].modules_to_save[name].state_dict())
    return wrappers[0], wrappers[1]


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def test_forward_switch_and_delete_as_peft() -> None:
    peft_wrapper, wrapper = both_wrapped("one", "two")
    x = torch.randn(3, 4)
    steps: list[tuple[str, tuple[Any, ...]]] = [
        ("set_adapter", ("two",)),
        ("set_adapter", (["one"],)),
        ("enable_adapters", (False,)),
        ("enable_adapters", (True,)),
        ("set_adapter", ("two", True)),
        ("set_requires_grad", ("one",)),
        ("set_requires_grad", (["one", "zzz"], False)),
        ("set_adapter", ([],)),
        ("set_adapter", ("one",)),
        ("delete_adapter", ("one", ["two"])),
        ("delete_adapter", ("two", [])),
    ]
    for method, arguments in steps:
        for each in (peft_wrapper, wrapper):
            getattr(each, method)(*arguments)
        assert flags(wrapper) == flags(peft_wrapper), method
        assert list(wrapper.state_dict()) == list(peft_wrapper.state_dict())
        assert wrapper.active_adapters == peft_wrapper.active_adapters
        assert wrapper.active_adapter == peft_wrapper.active_adapter
        assert wrapper.disable_adapters == peft_wrapper.disable_adapters
        torch.testing.assert_close(wrapper(x, twice=True), peft_wrapper(x, twice=True), rtol=0, atol=0)


def test_files_have_no_wrapper_level() -> None:
    peft_wrapper, wrapper = both_wrapped("one", "two")
    for name in ("one", "two", "three"):
        mapping = wrapper.adapter_state_dict_load_map(name)
        assert mapping == peft_wrapper.adapter_state_dict_load_map(name)
        tensors = wrapper.adapter_state_dict(name, wrapper.state_dict())
        assert list(tensors) == list(peft_wrapper.adapter_state_dict(name, peft_wrapper.state_dict()))
        assert set(tensors) == (set() if name == "three" else set(Head().state_dict()))
        for key, tensor in tensors.items():
            assert torch.equal(tensor, wrapper.modules_to_save[name].state_dict()[key])


def test_attributes_are_the_active_modules() -> None:
    _, wrapper = both_wrapped("one")
    assert wrapper.scale is wrapper.modules_to_save["one"].scale
    assert wrapper.dense.weight is wrapper.modules_to_save["one"].dense.weight
    assert wrapper.size == 4
    wrapper.enable_adapters(False)
    assert wrapper.scale is wrapper.original_module.scale
    with pytest.raises(AttributeError, match="nope"):
        _ = wrapper.nope


def test_the_copy_is_independent_and_the_original_frozen() -> None:
    head = Head()
    before = copy.deepcopy(head.state_dict())
    wrapper = ours.ModulesToSaveWrapper(head, "one")
    randomize(wrapper.modules_to_save["one"])
    assert wrapper.original_module is head
    for key, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert not any(p.requires_grad for p in head.parameters())
    assert all(p.requires_grad for p in wrapper.modules_to_save.parameters())
    wrapper.update("two")
    assert not any(p.requires_grad for p in wrapper.modules_to_save["two"].parameters())


def test_deepcopy_and_pickle() -> None:
    _, wrapper = both_wrapped("one", "two")
    x = torch.randn(3, 4)
    for clone in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert torch.equal(clone(x), wrapper(x))
        assert flags(clone) == flags(wrapper) and clone._get_available_adapters() == {"one", "two"}


def test_accelerate_hooks_of_the_copy_are_its_own() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    head = Head().eval()
    add_hook_to_module(head, AlignDevicesHook(execution_device="cpu"))
    wrapper = ours.ModulesToSaveWrapper(head, "one")
    clone = wrapper.modules_to_save["one"]
    assert clone._hf_hook is not head._hf_hook and clone.forward.args[0] is clone
    randomize(clone)
    x = torch.randn(3, 4)
    assert not torch.equal(wrapper(x), head(x))


def test_refusals() -> None:
    _, wrapper = both_wrapped("one", "two")
    with pytest.raises(ValueError, match="Adapter zzz not found"):
        wrapper.set_adapter("zzz")
    with pytest.raises(ValueError, match="multiple"):
        wrapper.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        wrapper.check_set_adapter(["one", "two"])
    assert wrapper.check_set_adapter(["zzz", "two"]) == "two" and wrapper.check_set_adapter("zzz") is None
    assert wrapper.active_adapters == ["one"]
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        wrapper(torch.randn(2, 4), adapter_names=["one"])
    for container in (nn.ModuleList(), nn.ModuleDict(), nn.ParameterList(), nn.ParameterDict()):
        with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
            ours.ModulesToSaveWrapper(container, "one")
    lora = LoraModel(Net(), LoraConfig(target_modules=["0"]), "one")
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        ours.ModulesToSaveWrapper(lora.model.body[0], "one")


def test_set_trainable_as_peft() -> None:
    nets = []
    for library in (theirs, ours):
        torch.manual_seed(0)
        net = Net()
        library._set_trainable(net, "one", module_names=["head"], inference_mode=False)
        library._set_trainable(
            net, "two", module_names=["sub_head", "body"], inference_mode=False, activate_adapter=False
        )
        library._set_trainable(net, "two", module_names=["nope"], inference_mode=False)
        nets.append(net)
    assert flags(nets[1]) == flags(nets[0])
    assert list(nets[1].state_dict()) == list(nets[0].state_dict())
    with pytest.raises(ValueError, match="not found in the base model"):
        ours._set_trainable(nets[1], "one", ["nope"], inference_mode=False, strict_module_check=True)
    with pytest.raises(ValueError, match="trainable_token_indices is not supported"):
        config = LoraConfig()
        config.trainable_token_indices = [1]
        ours.set_additional_trainable_modules(nets[1], config, {}, "one")


def test_set_adapter_changes_nothing_when_it_refuses() -> None:
    net = Net()
    ours._set_trainable(net, "one", ["body"], inference_mode=False)  # visited before the one that refuses
    for name in ("one", "two"):
        ours._set_trainable(net, name, ["sub_head"], inference_mode=False)
    ours._set_adapter(net, "two")
    before = flags(net)
    with pytest.raises(ValueError, match="Only one adapter"):
        ours._set_adapter(net, ["two", "one"])
    assert flags(net) == before
    assert net.body.active_adapters == [] and net.sub_head.active_adapters == ["two"]
    ours._set_adapter(net, "one")
    assert net.body.active_adapters == ["one"] and net.sub_head.active_adapters == ["one"]


def test_names_and_module_look_ups() -> None:
    net = Net()
    assert ours._get_submodules(net, "body.1") == (net.body, net.body[1], "1")
    assert ours._get_submodules(net, "head") == (net, net.head, "head")
    assert ours._get_submodules_with_grandparent(net, "head.dense") == (net.head, net, net.head.dense, "dense")
    assert (
        ours._get_submodules_with_grandparent(net, "head")[1] is theirs._get_submodules_with_grandparent(net, "head")[1]
    )
    for key in ("a.b", "b", "ab", "a.b.c"):
        assert ours._is_valid_match(key, "b") == theirs._is_valid_match(key, "b")
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        ours._get_batch_size(None, None)
    assert ours._get_batch_size(None, torch.zeros(3, 2, 4)) == 3


def test_small_tensor_helpers_as_peft() -> None:
    weight = nn.Parameter(torch.randn(3, 2))
    assert isinstance(ours.transpose(weight, True), nn.Parameter) and ours.transpose(weight, False) is weight
    assert torch.equal(ours.transpose(weight, True), theirs.transpose(weight, True))
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    expected = theirs.shift_tokens_right(labels, 1, 0)
    assert torch.equal(ours.shift_tokens_right(labels, 1, 0), expected)
    with pytest.raises(ValueError, match="pad_token_id"):
        ours.shift_tokens_right(labels, None, 0)
    assert ours.infer_device() == theirs.infer_device()
    base = torch.randn(4)
    assert ours.id_tensor_storage(base[:2]) == ours.id_tensor_storage(base[2:]) == theirs.id_tensor_storage(base)
    assert ours.id_tensor_storage(base) != ours.id_tensor_storage(base.clone())
    net = Net()
    net.body.requires_grad_(False)
    ours.cast_mixed_precision_params(net, torch.bfloat16)
    assert {p.dtype for p in net.body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in net.head.parameters()} == {torch.float32}


def test_adapter_name_as_module_to_save() -> None:
    """The parts of an adapter layer are called after the adapter: they are no modules of the base model."""
    config = LoraConfig(target_modules=["0"], modules_to_save=["default"])
    with warnings.catch_warnings(), pytest.raises(ValueError, match="Rename the adapter or the entry"):
        warnings.simplefilter("ignore")
        LoraModel(Net(), config, "default")
