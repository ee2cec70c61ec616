"""Operators on 4-bit weights with their kernels forced: layers of bitsandbytes end to end, beside plain torch."""

import bitsandbytes
import pytest
import torch

import peft_fast
from peft_fast.ops.functional import MixedSite, mixed_plan
from peft_fast.quantized import functional as quantized_functional, weights as quant
from peft_fast.quantized.functional import (
    linear_quantized,
    lora_linear_int8,
    lora_linear_mixed_4bit,
    lora_linear_quantized,
)


@pytest.fixture(params=["nf4", "nf4-dq", "fp4"])
def w(request: pytest.FixtureRequest) -> quant.FourBit:
    kind, _, nested = request.param.partition("-")
    layer = bitsandbytes.nn.Linear4bit(128, 48, False, torch.float32, bool(nested), kind)
    layer.weight.data = torch.randn(48, 128) * 0.02
    return quant.four_bit_of(layer.to("cpu"))


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_FAST_QUANT", "kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(w: quant.FourBit, dtype: torch.dtype) -> None:
    assert torch.equal(w.dequantize(dtype), w.dequantize(dtype, "torch"))


@pytest.mark.parametrize("M", [1, 5, 70])  # 70: more than the kernel for few rows takes
def test_inference(w: quant.FourBit, M: int) -> None:
    x, a, b, bias = torch.randn(M, 128), torch.randn(4, 128), torch.randn(48, 4), torch.randn(48)
    with torch.no_grad():
        y = lora_linear_quantized(x, w, a, b, 0.5, bias)
    right = x.double() @ w.dequantize(torch.float64, "torch").T + bias + 0.5 * (x @ a.T).double() @ b.double().T
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)


def test_training(w: quant.FourBit) -> None:
    x = torch.randn(7, 128).requires_grad_()
    a, b = torch.randn(4, 128).requires_grad_(), torch.randn(48, 4).requires_grad_()
    y = lora_linear_quantized(x, w, a, b, 0.5)
    dx, _, _ = torch.autograd.grad(y.sum(), (x, a, b))
    exact = w.dequantize(torch.float32, "torch")
    torch.testing.assert_close(y, x @ exact.T + 0.5 * x @ a.T @ b.T)
    torch.testing.assert_close(dx, torch.ones(7, 48) @ (exact + 0.5 * b @ a).detach())
    torch.testing.assert_close(linear_quantized(x, w), x @ exact.T)


@pytest.mark.parametrize("M", [3, 70])
def test_mixed(w: quant.FourBit, M: int) -> None:
    a = [torch.randn(r, 128) for r in (4, 8)]
    b = [torch.randn(48, 8), torch.randn(48, 8)]  # rows 8 elements apart
    addresses = torch.tensor([[x.data_ptr(), y.data_ptr()] for x, y in zip(a, b, strict=True)])
    ranks, scales = torch.tensor([4, 8], dtype=torch.int32), torch.tensor([0.5, 2.0])
    site = MixedSite(addresses, ranks, scales, torch.float32, 16, 0)
    slots = torch.arange(M) % 3 - 1
    x, bias = torch.randn(M, 128), torch.randn(48)
    with torch.no_grad():
        y = lora_linear_mixed_4bit(x, w, site, mixed_plan(slots, 2, 1), bias)
    right = x @ w.dequantize(torch.float32, "torch").T + bias
    for slot, (r, scale) in enumerate(((4, 0.5), (8, 2.0))):
        rows = slots == slot
        right[rows] += scale * x[rows] @ a[slot].T @ b[slot][:, :r].T
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8(threshold: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = bitsandbytes.nn.Linear8bitLt(128, 48, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
    w, bias = quant.weight_of(layer), layer.bias.data.to(dtype)
    x, a, b = torch.randn(9, 128, dtype=dtype), torch.randn(4, 128), torch.randn(48, 4)
    with torch.no_grad():
        y = lora_linear_int8(x, w, a, b, 0.5, bias, threshold)
        monkeypatch.setenv("PEFT_FAST_QUANT", "torch")
        plain = lora_linear_int8(x, w, a, b, 0.5, bias, threshold)
        library = layer(x) + (0.5 * (x.float() @ a.T) @ b.T).to(dtype)
    close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-2, atol=3e-2)
    torch.testing.assert_close(y, plain, **close)
    torch.testing.assert_close(y, library, rtol=1e-2, atol=3e-2)
    if threshold:
        assert (x.abs() >= threshold).any()


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced, the kernels are what LoRA layers run in inference."""
    if kind == "4-bit":
        base = bitsandbytes.nn.Linear4bit(128, 48, True, torch.float32, True, "nf4")
        base.support_avx512bf16_for_cpu = False
    else:
        base = bitsandbytes.nn.Linear8bitLt(128, 48, has_fp16_weights=False, threshold=2.5)
    model = torch.nn.Sequential(base).to("cpu")
    config = peft_fast.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft_fast.get_peft_model(model, config).eval()
    op = "linear_4bit" if kind == "4-bit" else "linear_int8"
    original, calls = getattr(quantized_functional, op), []
    monkeypatch.setattr(quantized_functional, op, lambda *args: calls.append(1) or original(*args))
    x = torch.randn(3, 128)
    with torch.no_grad():
        y = model(x)
        assert calls == [1]
        monkeypatch.delenv("PEFT_FAST_QUANT")
        torch.testing.assert_close(y, model(x), rtol=1e-2, atol=3e-2)
