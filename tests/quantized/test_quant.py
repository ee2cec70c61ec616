"""Views of bitsandbytes' weights: the same bits as bitsandbytes, every blocksize and size, before and after packing."""

import copy
import itertools
import threading
import time
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from torch import Tensor

from peft_fast.ops.choice import choose
from peft_fast.quantized import weights as quant
from peft_fast.quantized.functional import linear_quantized, lora_linear_quantized
from peft_fast.reference import quantized as reference_quant

SHAPES = [(64, 128), (48, 96), (33, 70), (17, 5), (256, 512)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear4bit(
    N: int = 64, K: int = 128, quant_type: str = "nf4", nested: bool = True, bias: bool = True,
    dtype: torch.dtype = torch.float32, storage: torch.dtype = torch.uint8, blocksize: int = 64,
) -> torch.nn.Module:  # fmt: skip
    """A quantized layer with random weights."""
    layer = bitsandbytes.nn.Linear4bit(K, N, bias, dtype, nested, quant_type, storage)
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(N, K, dtype=dtype) * 0.02, requires_grad=False, blocksize=blocksize, compress_statistics=nested,
        quant_type=quant_type, quant_storage=storage, module=layer,
    )  # fmt: skip
    return layer.to("cpu")


def linear8bit(N: int = 64, K: int = 128, bias: bool = True) -> torch.nn.Module:
    layer = bitsandbytes.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(N, K), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def truth(layer: torch.nn.Module, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes' own plain torch says of a layer that was not packed."""
    weight, state = layer.weight, layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    code = bnb.get_4bit_type(state.quant_type, device="cpu")
    bytes_ = weight.data.reshape(-1).view(torch.uint8)
    compute = _dequantize_4bit_compute.__wrapped__
    return compute(bytes_, absmax, code, state.blocksize, state.shape, dtype)


@pytest.mark.parametrize("quant_type, nested", [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_4_bits_are_bitsandbytes_bits(quant_type: str, nested: bool, blocksize: int) -> None:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        layer = linear4bit(*shape, quant_type, nested, blocksize=blocksize)
        w = quant.weight_of(layer)
        expected = truth(layer, dtype)
        assert torch.equal(w.dequantize(dtype), expected), (shape, dtype)
        assert torch.equal(reference_quant.dequantize_4bit(*w[:-1], dtype), expected), (shape, dtype)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_may_be_stored_in_another_type(storage: torch.dtype) -> None:
    layer = linear4bit(storage=storage)
    assert layer.weight.dtype == storage
    assert torch.equal(quant.weight_of(layer).dequantize(), truth(layer, torch.float32))


def test_the_view_has_the_dtype_before_quantization() -> None:
    assert quant.weight_of(linear4bit(dtype=torch.bfloat16)).dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bits_are_bitsandbytes_bits(dtype: torch.dtype) -> None:
    layer = linear8bit()
    scales = layer.weight.SCB
    expected = layer.weight.data.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))  # as in its MatMul8bitFp
    assert torch.equal(quant.weight_of(layer).dequantize(dtype), expected)
    layer.train()(torch.randn(2, 128))  # moves the scales from the weight to the layer's state
    assert layer.weight.SCB is None or layer.state.SCB is not None
    assert torch.equal(quant.weight_of(layer).dequantize(dtype), expected)


def test_what_is_not_quantized_is_said() -> None:
    with pytest.raises(ValueError, match=r"Linear4bit with a Params4bit of torch\.float32 is not"):
        quant.weight_of(bitsandbytes.nn.Linear4bit(64, 64))
    assert quant.kind_of(torch.nn.Linear(2, 2)) is None


# ------------------------------------------------------------------------------------------------ packing for CPUs
needs_packing = pytest.mark.skipif(not bnb.has_avx512bf16(), reason="bitsandbytes packs on CPUs with AVX512-BF16 only")


@needs_packing
@pytest.mark.parametrize("quant_type, nested", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_packing_is_bitsandbytes_own_and_can_be_undone(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    layer = linear4bit(96, 192, quant_type, nested, storage=storage).eval()
    other = copy.deepcopy(layer)
    before, bits = quant.weight_of(layer).dequantize(), layer.weight.data.clone()
    x = torch.randn(5, 192)
    expected = other(x)  # packs by itself
    assert quant.packs_for_cpu(layer, x) and quant.pack_for_cpu(layer)
    assert layer.weight.quant_state.packing_format_for_cpu
    assert torch.equal(layer(x), expected)
    assert torch.equal(quant.weight_of(layer).dequantize(), before)  # restored
    assert layer.weight.dtype == storage
    assert torch.equal(layer.weight.data.view(torch.uint8), bits.view(torch.uint8))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert layer.quant_state is layer.weight.quant_state


@needs_packing
@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_packed_before_is_read_with_a_warning(nested: bool) -> None:
    layer = linear4bit(nested=nested).eval()
    before = quant.weight_of(layer).dequantize()
    layer(torch.randn(2, 128))
    with pytest.warns(UserWarning, match="rounded its factors to bf16"):
        after = quant.weight_of(layer).dequantize()
    assert not torch.equal(after, before)
    assert ((after - before).abs() <= 2**-8 * before.abs()).all()


@needs_packing
@pytest.mark.parametrize("N, K, blocksize", [(48, 128, 64), (64, 96, 64), (64, 128, 256)])
def test_sizes_that_cannot_be_packed(N: int, K: int, blocksize: int) -> None:
    layer = linear4bit(N, K, blocksize=blocksize).eval()
    assert not quant.pack_for_cpu(layer)
    assert not hasattr(layer.weight.quant_state, "packing_format_for_cpu")


@needs_packing
def test_a_state_dict_is_the_exact_one() -> None:
    layer = linear4bit(quant_type="nf4", nested=True).eval()
    expected = {name: value.clone() for name, value in layer.state_dict().items()}
    quant.pack_for_cpu(layer)
    layer(torch.randn(2, 128))
    found = layer.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@needs_packing
def test_threads_pack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear4bit(256, 256, nested=False).eval()
    bits, calls, convert = layer.weight.data.clone(), [], bnb._convert_weight_packed_for_cpu

    def slow(*args: Any) -> Any:
        calls.append(1)
        time.sleep(0.05)
        return convert(*args)

    monkeypatch.setattr(bnb, "_convert_weight_packed_for_cpu", slow)
    threads = [threading.Thread(target=quant.pack_for_cpu, args=(layer,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    quant.restore(layer)
    assert torch.equal(layer.weight.data, bits)


# ---------------------------------------------------------------------------------------------- writing and products
@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_what_is_written_is_what_bitsandbytes_would_quantize(make) -> None:
    layer = make()
    w = quant.read(layer) + torch.randn(64, 128) * 0.01
    quant.write(layer, w.clone())
    if make is linear4bit:
        packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(layer.weight.data, packed)
        assert torch.equal(quant.read(layer), bnb.dequantize_4bit(packed, state))
        assert layer.quant_state is layer.weight.quant_state
    else:
        values, scales, _ = bnb.int8_vectorwise_quant(w.half())
        assert torch.equal(layer.weight.data, values)
        assert torch.equal(quant.weight_of(layer).scales, scales)
    before = quant.read(layer)
    quant.write(layer, before.clone())  # what is representable stays
    torch.testing.assert_close(quant.read(layer), before, rtol=2e-3, atol=1e-6)


def test_writing_keeps_the_dtype() -> None:
    layer = linear4bit(dtype=torch.bfloat16)
    quant.write(layer, quant.read(layer))
    assert quant.weight_of(layer).dtype == torch.bfloat16


def test_a_forward_after_writing_sees_the_new_weight() -> None:
    layer, x = linear8bit().eval(), torch.randn(2, 128)
    layer(x)  # the layer's state holds the old one
    w = torch.randn(64, 128)
    quant.write(layer, w.clone())
    expected = x @ w.T + layer.bias
    assert (layer(x) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_products_and_gradients(make, dtype: torch.dtype, p: float) -> None:
    layer = make()
    w, bias = quant.weight_of(layer), torch.randn(64, dtype=dtype).requires_grad_()
    x = torch.randn(3, 7, 128, dtype=dtype).requires_grad_()
    a, b = torch.randn(4, 128).requires_grad_(), torch.randn(64, 4).requires_grad_()
    seed, dy = torch.tensor([7]), torch.randn(3, 7, 64, dtype=dtype)
    y = lora_linear_quantized(x, w, a, b, 0.5, bias, dropout_p=p, seed=seed)
    got = [y, *torch.autograd.grad(y, (x, a, b, bias), dy)]

    def formula(kind: torch.dtype) -> list[Tensor]:
        xs, as_, bs, cs = (t.detach().to(kind).requires_grad_() for t in (x, a, b, bias))
        kept = xs
        if p:
            from peft_fast.reference.lora import dropout_bits, unpack_bits

            mask = unpack_bits(dropout_bits(seed, 21, 128, p), 128, torch.float32) != 0
            kept = xs * mask.view(3, 7, 128) / (1 - p)
        out = xs @ w.dequantize(dtype).to(kind).T + cs + 0.5 * (kept @ as_.T) @ bs.T
        return [out, *torch.autograd.grad(out, (xs, as_, bs, cs), dy.to(kind))]

    exact, plain = formula(torch.float64), formula(dtype)
    for mine, right, other in zip(got, exact, plain, strict=True):
        error, budget = (mine.double() - right).norm(), 2 * (other.double() - right).norm()
        assert error <= budget + 1e-6 * right.norm()
    y = linear_quantized(x, w, bias)
    assert torch.equal(y, torch.nn.functional.linear(x, w.dequantize(dtype), bias))
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    torch.testing.assert_close(dx, dy @ w.dequantize(dtype))
    torch.testing.assert_close(dbias, dy.sum((0, 1)))


def test_the_dequantized_weight_is_not_kept() -> None:
    """Between forward and backward live x, s and the adapters, and nothing of the weight's size."""
    layer = linear4bit(256, 512)
    w = quant.weight_of(layer)
    x = torch.randn(2, 512).requires_grad_()
    a, b = torch.randn(4, 512).requires_grad_(), torch.randn(256, 4).requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        lora_linear_quantized(x, w, a, b, 1.0).sum().backward()
    assert sizes and max(sizes) < 256 * 512


def test_wrong_arguments() -> None:
    w = quant.weight_of(linear4bit())
    a, b = torch.randn(4, 128), torch.randn(64, 4)
    with pytest.raises(ValueError, match=r"must share K, got \(2, 64\) and \(64, 128\)"):
        linear_quantized(torch.randn(2, 64), w)
    with pytest.raises(ValueError, match=r"b must be \(N, R\)"):
        lora_linear_quantized(torch.randn(2, 128), w, a, b.T, 1.0)
    with pytest.raises(ValueError, match="bias must be"):
        lora_linear_quantized(torch.randn(2, 128), w, a, b, 1.0, torch.randn(3))


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("lora_linear_4bit", torch.device("cpu"), torch.float32, 1, 64, 128, 8)
    assert choose(*arguments).name == "torch"
    with pytest.raises(RuntimeError, match="is a GPU kernel and x is on cpu"):
        choose(*arguments, implementation="kernel")
    monkeypatch.setenv("PEFT_FAST_QUANT", "torch")
    assert choose(*arguments) == ("torch", "forced by PEFT_FAST_QUANT")
    monkeypatch.setenv("PEFT_FAST_QUANT", "kernels")
    with pytest.raises(ValueError, match="must be one of"):
        choose(*arguments)
