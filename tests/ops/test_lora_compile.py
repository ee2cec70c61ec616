"""torch.compile: LoRA layers in one graph, forward and backward, no recompilation from call to call."""

from typing import Any

import pytest
import torch
from lora_pairs import ours, pair, randomize, run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from peft_fast.tuners.lora import LoraConfig
from peft_fast.tuners.lora.layer import Linear


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Compiled(nn.Module):
    """A model whose forward is compiled; parameters keep their names."""

    def __init__(self, model: Any, backend: Any) -> None:
        super().__init__()
        self.__dict__["whole"] = model
        self.__dict__["compiled"] = torch.compile(model, backend=backend, fullgraph=True)
        self.config = model.config

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole.named_parameters(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.whole.zero_grad(set_to_none)

    def forward(self, **inputs: Any) -> Any:
        return self.compiled(use_cache=False, **inputs)


def _same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_llama_in_one_graph() -> None:
    """Training with dropout (the eager model with the same seed draws the same mask) and evaluation, one graph each."""
    model = pair("llama", r=4, lora_alpha=6, lora_dropout=0.2)[0]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = _Compiled(model, counter)
    for graphs, mode in enumerate((True, False), start=1):
        model.train(mode)
        for seed in range(3):
            _same(run(compiled, seed=seed), run(model, seed=seed))
            # an optimizer's step between the calls changes weights in place
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_other_layers_in_one_graph(name: str) -> None:
    model = pair(name, r=4, lora_alpha=6)[0]
    _same(run(_Compiled(model, "aot_eager")), run(model))


def test_several_adapters_and_switching() -> None:
    model = ours(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 7)), "a", r=4, target_modules=["0", "1"])
    model.peft_config["b"] = LoraConfig(r=3, target_modules=["1"])
    model.inject_adapter(model.model, "b")
    randomize(model)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(5, 8)
    outputs = []
    for active in (["a"], ["b"], ["a", "b"], "a", None):
        if active is None:
            model.disable_adapter_layers()
        else:
            model.set_adapter(active)
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], model(x))
    assert torch.equal(outputs[0], outputs[3]) and len({y.sum().item() for y in outputs}) == 4


def test_hooked_base_in_one_graph() -> None:
    layer = Linear(nn.Linear(8, 6).requires_grad_(False), "default", LoraConfig(lora_bias=True), r=2, lora_alpha=3)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    x = torch.randn(5, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_dynamic_sizes() -> None:
    layer = Linear(nn.Linear(8, 6).requires_grad_(False), "default", LoraConfig(), r=2, lora_alpha=3)
    nn.init.normal_(layer.lora_B["default"].weight)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for rows in (5, 7, 11, 13):
        x = torch.randn(2, rows, 8)
        torch.testing.assert_close(compiled(x), layer(x))
        counts.add(counter.frame_count)
    assert len(counts) == 1


def test_inductor() -> None:
    layer = Linear(nn.Linear(16, 12).requires_grad_(False), "default", LoraConfig(lora_dropout=0.3), r=4, lora_alpha=6)
    nn.init.normal_(layer.lora_B["default"].weight)
    compiled = torch.compile(layer, fullgraph=True)
    layer.eval()
    results = []
    for function in (compiled, layer):
        x = torch.linspace(-1, 1, 5 * 16).view(5, 16).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
        layer.zero_grad()
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    layer.train()
    assert compiled(torch.randn(5, 16)).isfinite().all()


@pytest.mark.parametrize("opaque", [False, True], ids=["fused", "opaque base"])
def test_inference_on_a_cpu_leaves_no_operator_that_a_compiler_cannot_look_into(opaque: bool) -> None:
    """The formula itself is in the graph, so that it is fused; with gradients the operator is."""
    model = ours(nn.Sequential(nn.Linear(8, 6)), "default", r=4, target_modules=["0"])
    layer: Any = model.model[0]
    randomize(model)
    if opaque:
        layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    targets: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert targets and not any("peft_fast" in target for target in targets)
