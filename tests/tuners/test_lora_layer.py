"""One LoRA layer at a time beside the installed peft: values, every gradient, what fuses and what must not."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_layers import K, N, R, check, conv1d, frozen, layers, results
from torch import Tensor, nn

from numerics import assert_as_accurate
from peft_fast.tuners.lora import LoraConfig, layer as our_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(K, N),
    "linear-no-bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": conv1d,
}


# ---------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7,), (0, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_linear(base: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mine, their = (layer.to(dtype) for layer in layers(frozen(BASES[base]())))
    got = check(mine, their, torch.randn(*shape, K).to(dtype))
    assert got["y"].dtype == dtype and got["y"].shape == (*shape, N)
    assert set(got) == {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}


@pytest.mark.parametrize("base", BASES)
def test_linear_in_fp64(base: str) -> None:
    mine, their = (layer.double() for layer in layers(frozen(BASES[base]())))
    x = torch.randn(3, 5, K).double()
    got, expected = results(mine, x), results(their, x)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_one_vector_and_no_grad(base: str, dtype: torch.dtype) -> None:
    mine, their = (layer.to(dtype) for layer in layers(frozen(BASES[base]())))
    x = torch.randn(K).to(dtype)
    with torch.no_grad():
        assert_as_accurate("y", mine(x), their(x), copy.deepcopy(their).double()(x.double()))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapters_in_another_dtype(x_dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """The yardstick is peft's layer with its adapter in the dtype of x; gradients come in the adapter's own."""
    mine, their = (layer.to(x_dtype) for layer in layers(frozen(nn.Linear(K, N))))
    for name, parameter in mine.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    got = check(mine, their, torch.randn(3, 5, K).to(x_dtype))
    assert got["y"].dtype == x_dtype and got["lora_B.default.weight"].dtype == adapter_dtype


@pytest.mark.parametrize("base", BASES)
def test_settings(base: str) -> None:
    for config in (dict(use_rslora=True), dict(r=1, lora_alpha=3), dict(r=N + 9), dict(lora_alpha=-2)):
        mine, their = layers(frozen(BASES[base]()), **config)
        assert mine.scaling == their.scaling
        check(mine, their, torch.randn(5, K))


def test_lora_bias() -> None:
    mine, their = layers(frozen(nn.Linear(K, N)), lora_bias=True)
    assert "lora_B.default.bias" in check(mine, their, torch.randn(5, K))
    mine, their = (layer.bfloat16() for layer in (mine, their))
    check(mine, their, torch.randn(5, K).bfloat16())


@pytest.mark.parametrize("active", [["b"], ["a", "b"], ["c", "b", "a"], ["a", "unknown"], [], ["unknown"]], ids=str)
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_several_active(base: str, active: list[str]) -> None:
    mine, their = layers(frozen(BASES[base]()), names=("a", "b", "c"))
    for layer in (mine, their):
        layer.scaling["b"] = 0.7
        layer.set_adapter(active)
    x = torch.randn(5, K)
    if any(name in mine.lora_A for name in active):
        check(mine, their, x)
    else:
        assert torch.equal(mine(x), mine.base_layer(x))


def test_trained_biases_and_base_weights() -> None:
    """bias="all" trains the base's bias; whoever thaws the base weight gets its gradient as well."""
    mine, their = layers(frozen(nn.Linear(K, N)))
    for layer in (mine, their):
        layer.base_layer.bias.requires_grad = True
    assert "base_layer.bias" in check(mine, their, torch.randn(5, K))
    for layer in (mine, their):
        layer.base_layer.weight.requires_grad = True
    assert "base_layer.weight" in check(mine, their, torch.randn(5, K))


# --------------------------------------------------------------------------------------------------------- dropout
@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "opaque"])
def test_dropout_drops_the_adapters_input_only(hooked: bool) -> None:
    """With A and B the identity, what the adapter adds is x with elements dropped, the others scaled by 1 / (1 - p)."""
    base = nn.Linear(K, K, bias=False)
    mine = our_layer.Linear(frozen(base), "default", LoraConfig(r=K, lora_dropout=0.4), r=K, lora_alpha=K)
    for module in (mine.lora_A["default"], mine.lora_B["default"]):
        nn.init.eye_(module.weight)
    if hooked:
        base.register_forward_hook(lambda module, args, y: y)
    x = torch.randn(200, K).abs() + 1
    added = mine(x) - base(x)
    kept = added > 0.5
    torch.testing.assert_close(added, torch.where(kept, x / 0.6, 0.0), rtol=1e-4, atol=1e-4)
    # 5 deviations of the share of dropped elements
    assert abs(1 - kept.double().mean().item() - 0.4) < 5 * math.sqrt(0.24 / kept.numel())
    assert not torch.equal(mine(x), mine(x))
    torch.testing.assert_close(mine.eval()(x) - base(x), x, rtol=1e-4, atol=1e-4)


def test_each_active_adapter_drops_on_its_own() -> None:
    mine = layers(frozen(nn.Linear(K, N)), names=("a", "b"), lora_dropout=0.5)[0]
    for name in "ab":
        nn.init.ones_(mine.lora_A[name].weight)
        nn.init.ones_(mine.lora_B[name].weight)
    mine.set_adapter(["a", "b"])
    mine.scaling["b"] = -mine.scaling["a"]
    x = torch.randn(5, K)
    assert not torch.allclose(mine(x), mine.base_layer(x), atol=1e-3)


def test_the_dropout_module_decides() -> None:
    """Its own training flag counts, as in peft; dropping everything leaves the base; other modules run as they are."""
    mine = layers(frozen(nn.Linear(K, N)), lora_dropout=0.5)[0]
    x = torch.randn(5, K)
    mine.lora_dropout.eval()
    assert mine.training and torch.equal(mine(x), mine(x))
    mine.lora_dropout["default"] = nn.Dropout(1.0)
    assert torch.equal(mine(x), mine.base_layer(x))
    mine.lora_dropout["default"] = nn.Tanh()
    expected = mine.base_layer(x) + mine.scaling["default"] * mine.lora_B["default"](mine.lora_A["default"](x.tanh()))
    torch.testing.assert_close(mine(x), expected)


# ------------------------------------------------------------------------------------ what must not be fused away
class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Opaque(nn.Module):
    """A linear layer with a weight of its own kind, as quantized ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("codes", torch.randint(-9, 9, (N, K), dtype=torch.int8))

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return x @ self.codes.to(x.dtype).T / 9 + shift


def patched() -> nn.Module:
    base = nn.Linear(K, N)
    base.forward = lambda x: torch.tanh(nn.Linear.forward(base, x))
    return base


def _count(calls: list[str], name: str, result: Any = None) -> Callable[..., Any]:
    def hook(*args: Any) -> Any:
        calls.append(name)
        return result(args[-1]) if result else None

    return hook


def _hooks(module: nn.Module, calls: list[str]) -> list[Any]:
    return [
        module.register_forward_pre_hook(_count(calls, "pre")),
        module.register_forward_hook(_count(calls, "forward", lambda y: y * 1.5)),
        module.register_full_backward_pre_hook(_count(calls, "backward-pre")),
        module.register_full_backward_hook(_count(calls, "backward")),
    ]


@pytest.mark.parametrize("where", ["base_layer", "lora_A.default", "lora_B.default"])
@pytest.mark.parametrize("which", range(4), ids=["pre", "forward", "backward-pre", "backward"])
def test_hooks_run(where: str, which: int) -> None:
    mine, their = layers(frozen(nn.Linear(K, N)))
    calls: tuple[list[str], list[str]] = ([], [])
    for layer, seen in zip((mine, their), calls, strict=True):
        for i, handle in enumerate(_hooks(layer.get_submodule(where), seen)):
            if i != which:
                handle.remove()
    x = torch.randn(5, K)
    got, expected = results(mine, x), results(their, x)
    assert calls[0] == calls[1] and len(calls[0]) == 1
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_global_hooks_run() -> None:
    mine = layers(frozen(nn.Linear(K, N)))[0]
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    try:
        mine(torch.randn(5, K))
    finally:
        handle.remove()
    assert seen.count("Linear") == 4  # base, A, B and the layer itself


def test_opaque_bases() -> None:
    """A subclass, a patched forward and a layer that is no nn.Linear are called, and the adapter is added."""
    x = torch.randn(2, 5, K)
    for base in (Doubling(K, N), patched(), Opaque()):
        mine = our_layer.Linear(frozen(base), "default", LoraConfig(r=R), r=R, lora_alpha=6)
        nn.init.normal_(mine.lora_B["default"].weight)
        update = mine.lora_B["default"](mine.lora_A["default"](x)) * mine.scaling["default"]
        torch.testing.assert_close(mine(x), base(x) + update)
    torch.testing.assert_close(mine(x, shift=2.0), base(x) + 2 + update)
    torch.testing.assert_close(mine(x, 3.0), base(x) + 3 + update)
    with pytest.raises(ValueError, match="quantized"):
        mine.merge()


def test_opaque_base_of_another_dtype() -> None:
    """The result has the base's dtype."""
    mine = our_layer.Linear(frozen(Opaque()), "default", LoraConfig(r=R), r=R, lora_alpha=6)
    mine.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], N, dtype=torch.bfloat16)
    assert mine(torch.randn(5, K)).dtype == torch.bfloat16
    mine.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], N)
    assert mine(torch.randn(5, K).bfloat16()).dtype == torch.float32


def test_tensor_subclasses_are_left_alone() -> None:
    """Their operators are their own: the base is called as a module, and the adapter's modules on such an x."""

    class Tagged(Tensor):
        pass

    mine = layers(frozen(nn.Linear(K, N)))[0]
    x = torch.randn(5, K)
    expected = mine(x)
    assert type(mine(x.as_subclass(Tagged))) is Tagged
    torch.testing.assert_close(mine(x.as_subclass(Tagged)).as_subclass(Tensor), expected)
    mine.base_layer.weight = nn.Parameter(mine.base_layer.weight.as_subclass(Tagged), requires_grad=False)
    torch.testing.assert_close(torch.as_tensor(mine(x)).as_subclass(Tensor), expected)


def test_a_base_of_another_dtype_says_so_itself() -> None:
    mine, their = (layer.bfloat16() for layer in layers(frozen(nn.Linear(K, N))))
    for layer in (mine, their):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(5, K))


def test_a_replaced_base_layer() -> None:
    mine = layers(frozen(nn.Linear(K, N)))[0]
    x = torch.randn(5, K)
    update = mine(x) - mine.base_layer(x)
    mine.base_layer = frozen(Doubling(K, N))
    torch.testing.assert_close(mine(x), mine.base_layer(x) + update)


def test_casting_of_inputs_can_be_switched_off() -> None:
    """A hook that does the casting then sees x as it is."""
    mine = layers(frozen(nn.Linear(K, N)))[0]
    seen = []

    def to_adapter(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0].dtype)
        return (args[0].to(module.weight.dtype),)

    mine.base_layer.bfloat16()
    mine.lora_A["default"].register_forward_pre_hook(to_adapter)
    for enabled in (True, False):
        mine.cast_input_dtype_enabled = enabled
        assert mine(torch.randn(5, K).bfloat16()).dtype == torch.bfloat16
    assert seen == [torch.float32, torch.bfloat16]


# --------------------------------------------------------------------------------------------- scaling and settings
def test_scaling() -> None:
    both = layers(frozen(nn.Linear(K, N)), names=("a", "b"), use_rslora=True)
    for layer in both:
        layer.set_adapter(["a"])
        layer.scale_layer(3)
        layer.set_scale("b", 0.5)
        layer.set_scale("unknown", 2)
    assert both[0].scaling == both[1].scaling == {"a": 9.0, "b": 1.5}
    for layer in both:
        layer.unscale_layer(1.5)
    assert both[0].scaling == both[1].scaling == {"a": 6.0, "b": 1.5}
    for layer in both:
        layer.unscale_layer()
    assert both[0].scaling == both[1].scaling == {"a": 3.0, "b": 1.5}


def test_delete_and_update() -> None:
    mine = layers(frozen(nn.Linear(K, N)), names=("a", "b"))[0]
    mine.set_adapter(["b"])
    mine.delete_adapter("a")
    entries = (mine.lora_A, mine.lora_B, mine.lora_dropout, mine.scaling, mine.r, mine.lora_alpha, mine.use_rslora)
    assert all(list(entry) == ["b"] for entry in entries)
    mine.update_layer("a", 2, 3, LoraConfig())
    assert mine.r == {"b": R, "a": 2} and not mine.lora_A["a"].weight.requires_grad
    mine.update_layer("c", 2, 3, LoraConfig(inference_mode=True))
    assert mine.lora_B["b"].weight.requires_grad and mine.supports_lora_conversion()


def test_new_adapters_have_the_base_layers_dtype() -> None:
    mine = our_layer.Linear(nn.Linear(K, N).bfloat16(), "default", LoraConfig(), r=2, lora_alpha=1)
    assert mine.lora_A["default"].weight.dtype == mine.lora_B["default"].weight.dtype == torch.bfloat16


def test_lora_bias_over_a_base_without_one() -> None:
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        mine = our_layer.Linear(nn.Linear(K, N, bias=False), "default", LoraConfig(lora_bias=True), r=2, lora_alpha=1)
    before = mine.base_layer.weight.clone()
    for safe in (True, False):
        with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
            mine.merge(safe_merge=safe)
    assert torch.equal(mine.base_layer.weight, before) and not mine.merged


# --------------------------------------------------------------------------------------------------------- merging
MERGE_BASES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(K, N), "Linear", {}),
    "linear-lora_bias": (lambda: nn.Linear(K, N), "Linear", {"lora_bias": True}),
    "conv1d": (conv1d, "Linear", {}),
    "embedding": (lambda: nn.Embedding(K, N), "Embedding", {}),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), "Conv2d", {}),
    "conv2d-1x1-lora_bias": (lambda: nn.Conv2d(6, 8, 1), "Conv2d", {"lora_bias": True}),
}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MERGE_BASES)
def test_merge(name: str, base_dtype: torch.dtype, adapter_dtype: torch.dtype, safe: bool) -> None:
    make, kind, config = MERGE_BASES[name]
    mine, their = layers(frozen(make()), kind, names=("a", "b"), **config)
    for layer in (mine, their):
        layer.to(adapter_dtype)
        layer.base_layer.to(base_dtype)
        layer.set_adapter(["a", "b"])
    before = {k: v.clone() for k, v in mine.base_layer.state_dict().items()}
    for layer in (mine, their):
        layer.merge(safe_merge=safe)
    assert mine.merged_adapters == ["a", "b"]
    eps = torch.finfo(base_dtype).eps
    # convolutions sum the products in another order than peft's; peft rounds an embedding's update once more
    exactly = kind == "Linear"
    for key, value in their.base_layer.state_dict().items():
        got, size = mine.base_layer.state_dict()[key], value.abs().max().item()
        torch.testing.assert_close(got, value, rtol=0, atol=0 if exactly else 2 * eps * size, msg=key)
        assert not torch.equal(got, before[key]) or (key == "bias" and "lora_bias" not in config)
    mine.unmerge()
    for key, value in before.items():
        torch.testing.assert_close(mine.base_layer.state_dict()[key], value, rtol=4 * eps, atol=16 * eps, msg=key)


def test_merge_named_adapters_and_warnings() -> None:
    mine = layers(frozen(nn.Linear(K, N)), names=("a", "b"))[0]
    with pytest.warns(UserWarning, match=r"Already unmerged. Nothing to do."):
        mine.unmerge()
    mine.merge(adapter_names=["b", "unknown"])
    assert mine.merged_adapters == ["b"]
    x = torch.randn(5, K)
    torch.testing.assert_close(mine(x), mine.base_layer(x) + mine._low_rank(x, "a"))  # a is active, and not merged
    with pytest.warns(UserWarning, match="additionally merging"):
        mine.merge(adapter_names=["a"])
    assert torch.equal(mine(x), mine.base_layer(x))
    mine.enable_adapters(False)
    original = mine(x)
    assert not mine.merged
    mine.enable_adapters(True)
    assert (mine(x) - original).abs().max() > 0.1


def test_safe_merge_of_a_broken_bias() -> None:
    mine = layers(frozen(nn.Linear(K, N)), lora_bias=True)[0]
    mine.lora_B["default"].bias.data[3] = float("inf")
    before = {k: v.clone() for k, v in mine.base_layer.state_dict().items()}
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        mine.merge(safe_merge=True)
    assert all(torch.equal(v, before[k]) for k, v in mine.base_layer.state_dict().items()) and not mine.merged


# ---------------------------------------------------------------------------------------------------------- others
@pytest.mark.parametrize("name", MERGE_BASES)
def test_repr_state_dict_pickle_and_deepcopy(name: str) -> None:
    make, kind, config = MERGE_BASES[name]
    mine, their = layers(frozen(make()), kind, lora_dropout=0.1, **config)
    assert repr(mine) == repr(their) and repr(mine).startswith(f"lora.{kind}(")
    assert list(mine.state_dict()) == list(their.state_dict())
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert repr(other) == repr(mine) and other.scaling == mine.scaling
        assert all(torch.equal(v, mine.state_dict()[k]) for k, v in other.state_dict().items())


def test_functional_call_uses_the_given_tensors() -> None:
    mine = layers(frozen(nn.Linear(K, N)))[0]
    x = torch.randn(5, K)
    given = {name: torch.randn_like(tensor) for name, tensor in mine.state_dict().items()}
    expected = copy.deepcopy(mine)
    expected.load_state_dict(given)
    torch.testing.assert_close(torch.func.functional_call(mine, given, (x,)), expected(x))


def test_a_layer_that_does_not_tell_its_sizes() -> None:
    with pytest.raises(ValueError, match="does not tell its in_features"):
        our_layer.Linear(nn.LayerNorm(K), "default", LoraConfig(), r=2, lora_alpha=1)
    assert our_layer.dispatch_default(nn.LayerNorm(K), "default", LoraConfig(), r=2, lora_alpha=1) is None
    assert type(our_layer.dispatch_default(Opaque(), "default", LoraConfig(), r=2, lora_alpha=1)) is our_layer.Linear
