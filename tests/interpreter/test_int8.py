"""int8 products: x to int8 bit for bit as bitsandbytes does it, everything else against fp64.

The kernels are imported inside of functions: their candidates are no business of the tests collected after these.
"""

import pytest
import torch

from numerics import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 50, 64, 8), (3, 1, 7, 1), (37, 33, 200, 40), (130, 70, 129, 100), (5, 40, 96, 0)]  # M, N, K, R
IDS = [f"M{m}-N{n}-K{k}-R{r}" for m, n, k, r in SHAPES]


def rowwise(x, threshold=0.0):
    """bitsandbytes' formula: q and absmax."""
    half = x.half()
    if threshold:
        half = half.masked_fill(half.abs() >= threshold, 0)
    absmax = half.abs().amax(1).float()
    return torch.round(half * (127.0 / absmax.where(absmax > 0, torch.ones_like(absmax)))[:, None]).char(), absmax


def draw(M, N, K, R, dtype, adapter_dtype=torch.float32):
    """x, w (int8), w_absmax, bias, a, b."""
    x, bias = torch.randn(M, K, device=DEVICE).to(dtype), torch.randn(N, device=DEVICE).to(dtype)
    w = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=DEVICE)
    w_absmax = torch.rand(N, device=DEVICE) / K**0.5
    if R == 0:
        return x, w, w_absmax, bias, None, None
    a, b = torch.randn(R, K, device=DEVICE) / K**0.5, torch.randn(N, R, device=DEVICE) / R**0.5
    return x, w, w_absmax, bias, a.to(adapter_dtype), b.to(adapter_dtype)


def check_quantize(x, a=None, threshold=0.0):
    from csrc_triton.quantized.int8_quantize import int8_quantize

    q, absmax, planes = int8_quantize(x, a, 1.7, threshold)
    expected, expected_absmax = rowwise(x, threshold)
    assert torch.equal(q, expected) and torch.equal(absmax, expected_absmax)
    if a is None:
        assert planes is None
    else:
        assert planes.dtype == (x.dtype if len(planes) == 1 else torch.float32)
        s = planes.sum(0).to(x.dtype)
        assert_as_accurate("s", s, 1.7 * x @ a.to(x.dtype).T, 1.7 * x.double() @ a.double().T)
    return q, absmax, planes


def check_gemm(x, w, w_absmax, bias, a, b):
    """q, absmax and s are given, so that the budget is that of the product alone; planes change no bit of s."""
    from csrc_triton.quantized.int8_linear import int8_gemm

    q, absmax = rowwise(x)
    s = None if a is None else (x @ a.to(x.dtype).T)
    y = int8_gemm(q, absmax, w, w_absmax, bias, None if s is None else s[None], b, x.dtype)
    if s is not None:
        planes = torch.stack([s.float() / 2] + [s.float() / 4] * 2)
        assert torch.equal(int8_gemm(q, absmax, w, w_absmax, bias, planes, b, x.dtype), y)
    same = (q.float() @ w.float().T * (absmax[:, None] * w_absmax) / 127**2).to(x.dtype)
    exact = q.double() @ w.double().T * (absmax.double()[:, None] * w_absmax.double()) / 127**2
    if a is not None:
        same, exact = same + s @ b.to(x.dtype).T, exact + s.double() @ b.double().T
    if bias is not None:
        same, exact = same + bias, exact + bias.double()
    assert y.dtype == x.dtype
    assert_as_accurate("y", y, same, exact)
    return y


@pytest.fixture(params=["few rows", "many rows"])
def kernel(request, monkeypatch):
    """Both kernels, whatever the number of rows."""
    from csrc_triton.quantized import int8_quantize

    monkeypatch.setattr(int8_quantize, "FEW_ROWS", 1 << 62 if request.param == "few rows" else 0)
    return request.param


@pytest.mark.usefixtures("kernel")
class TestQuantize:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("threshold", [0.0, 1.5])
    @pytest.mark.parametrize("shape", SHAPES, ids=IDS)
    def test_bit_for_bit(self, shape, threshold, dtype):
        x, _, _, _, a, _ = draw(*shape, dtype)
        check_quantize(x, a, threshold)

    def test_halves_go_to_even(self):
        """absmax 127 makes the factor 1."""
        x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]], device=DEVICE, dtype=torch.float16)
        q, _, _ = check_quantize(x)
        assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]

    def test_rows_of_zeros_and_of_outliers_alone(self):
        x = torch.zeros(3, 40, device=DEVICE, dtype=torch.bfloat16)
        x[1], x[2, 3] = 8.0, 1.0
        q, absmax, _ = check_quantize(x, threshold=6.0)
        assert absmax.tolist() == [0, 0, 1] and (q[:2] == 0).all() and q[2, 3] == 127

    def test_strides(self):
        """x with gaps, a transposed."""
        x, a = torch.randn(20, 144, device=DEVICE)[:, ::2], torch.randn(72, 5, device=DEVICE).T
        check_quantize(x, a)

    def test_what_bitsandbytes_makes(self):
        bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
        from csrc_triton.quantized.int8_quantize import int8_quantize

        x = torch.randn(33, 96, device=DEVICE, dtype=torch.float16)
        x[5, 7] = 9.0
        for threshold in (0.0, 6.0):
            q, absmax, _ = int8_quantize(x, threshold=threshold)
            expected, expected_absmax, outliers = bnb.int8_vectorwise_quant(x.clone(), threshold)
            if threshold:
                q[:, outliers] = 0
            assert torch.equal(absmax, expected_absmax) and torch.equal(q, expected)

    def test_empty(self):
        from csrc_triton.quantized.int8_quantize import int8_quantize

        for M, K in ((0, 5), (3, 0)):
            x, a = torch.randn(M, K, device=DEVICE), torch.randn(4, K, device=DEVICE)
            q, absmax, planes = int8_quantize(x, a)
            assert q.shape == (M, K) and torch.equal(absmax, x.new_zeros(M))
            assert torch.equal(planes.sum(0), x.new_zeros(M, 4))


class TestGemm:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=IDS)
    def test_forward(self, shape, dtype):
        check_gemm(*draw(*shape, dtype))

    def test_adapters_of_16_bits_no_bias_strides(self):
        x, w, w_absmax, _, a, b = draw(20, 50, 64, 8, torch.bfloat16, torch.bfloat16)
        wide = torch.zeros(50, 100, dtype=torch.int8, device=DEVICE)
        wide[:, 5:69] = w
        check_gemm(x, wide[:, 5:69], w_absmax, None, a, b.T.contiguous().T)

    def test_exact_where_sums_are_large(self):
        """Beyond what fp32 counts to: absmax of 127 make the scale 1, so that y is the integer itself, rounded once."""
        from csrc_triton.quantized.int8_linear import int8_gemm

        K, one = 2048, torch.full((1,), 127.0, device=DEVICE)
        q = torch.full((1, K), 127, dtype=torch.int8, device=DEVICE)
        w = q.clone()
        w[0, 0] = 126
        y = int8_gemm(q, one, w, one, None, None, None, torch.float32)
        assert y.item() == torch.tensor(float(127 * 127 * K - 127)).item()

    @pytest.mark.parametrize("M, N, K", [(0, 5, 6), (4, 0, 6), (4, 5, 0)])
    def test_empty(self, M, N, K):
        from csrc_triton.quantized.int8_linear import int8_gemm

        q, w = (torch.zeros(size, K, dtype=torch.int8, device=DEVICE) for size in (M, N))
        y = int8_gemm(q, torch.zeros(M, device=DEVICE), w, torch.ones(N, device=DEVICE), None, None, None, torch.half)
        assert torch.equal(y, torch.zeros(M, N, dtype=torch.half, device=DEVICE))


def test_both_as_one_linear(launches):
    """Against the layer's function with the weight dequantized: two launches, the error that of x in 8 bits."""
    from csrc_triton.quantized.int8_linear import int8_gemm

    x, w, w_absmax, bias, a, b = draw(37, 50, 200, 8, torch.float16)
    q, absmax, planes = check_quantize(x, a)
    y = int8_gemm(q, absmax, w, w_absmax, bias, planes, b, x.dtype)
    assert launches == ["int8_quantize_rows", "int8_gemm"]
    base = x.double() @ (w.double() * w_absmax.double()[:, None] / 127).T
    exact = base + 1.7 * (x.double() @ a.double().T) @ b.double().T + bias.double()
    assert (y.double() - exact).norm() / exact.norm() < 0.02


class TestCandidates:
    """On sizes that need several tiles in each direction and fill none."""

    def test_quantize(self, force, monkeypatch):
        from csrc_triton.quantized import int8_quantize

        monkeypatch.setattr(int8_quantize, "FEW_ROWS", 0)
        for candidate in int8_quantize.CANDIDATES:
            force("int8_quantize", candidate.config)
            x, _, _, _, a, _ = draw(candidate.blocks["BLOCK_M"] + 3, 1, 300, 150, dtype_of(candidate))
            check_quantize(x, a)

    def test_quantize_rows(self, force):
        """K of 1500 leaves the last planes with a part of a step, or with none."""
        from csrc_triton.quantized.int8_quantize import ROWS_CANDIDATES

        for candidate in ROWS_CANDIDATES:
            force("int8_quantize_rows", candidate.config)
            for K in (300, 1500):
                x, _, _, _, a, _ = draw(candidate.blocks["BLOCK_M"] + 3, 1, K, 150, dtype_of(candidate))
                _, _, planes = check_quantize(x, a)
                assert len(planes) == candidate.blocks["SPLIT"]

    def test_gemm(self, force):
        from csrc_triton.quantized.int8_linear import GEMM_CANDIDATES

        for candidate in GEMM_CANDIDATES:
            force("int8_gemm", candidate.config)
            check_gemm(*draw(candidate.blocks["BLOCK_M"] + 3, 145, 150, 70, dtype_of(candidate)))

    def test_the_order_of_tiles_changes_no_bit(self, force):
        arguments = draw(70, 130, 150, 8, torch.bfloat16)
        results = []
        for group in (1, 2, 3, 8):
            force("int8_gemm", dict(BLOCK_M=16, BLOCK_N=32, GROUP_M=group))
            results.append(check_gemm(*arguments))
        assert all(torch.equal(results[0], other) for other in results)


def dtype_of(candidate):
    return torch.float32 if candidate.itemsize == 4 else torch.bfloat16
