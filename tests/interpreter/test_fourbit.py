"""Dequantization of 4-bit weights, bit for bit; the fused products with such weights against fp64.

The kernels are imported inside of functions: their candidates are no business of the tests collected after these.
"""

import itertools

import pytest
import torch
from mixed_sites import RANKS, Adapters, in_double, mixes, update

from numerics import assert_as_accurate
from peft_fast.ops import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 += [-value for value in FP4]
CODES = {"nf4": NF4, "fp4": FP4}


class Quantized:
    """A random weight (N, K) as bitsandbytes keeps it, and what it stands for, in fp32."""

    def __init__(self, N, K, blocksize=64, nested_blocksize=None, quant_type="nf4"):
        from csrc_triton.quantized.fourbit import Nested

        blocks = -(-N * K // blocksize)
        self.shape, self.blocksize, self.nested, self.quant_type = (N, K), blocksize, None, quant_type
        self.packed = torch.randint(0, 256, ((N * K + 1) // 2,), dtype=torch.uint8, device=DEVICE)
        self.code = torch.tensor(CODES[quant_type], device=DEVICE)
        self.absmax = absmax = torch.rand(blocks, device=DEVICE) / K**0.5
        if nested_blocksize:
            self.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=DEVICE)
            code2, offset = torch.randn(256, device=DEVICE).sort().values, torch.tensor(0.3 / K**0.5, device=DEVICE)
            absmax2 = torch.rand(-(-blocks // nested_blocksize), device=DEVICE) / 5 / K**0.5
            self.nested = Nested(code2, absmax2, offset, nested_blocksize)
            absmax = code2[self.absmax.long()] * absmax2.repeat_interleave(nested_blocksize)[:blocks] + offset
        q = torch.stack([self.packed >> 4, self.packed & 15], 1).flatten().long()[: N * K]
        self.w = (self.code[q] * absmax.repeat_interleave(blocksize)[: N * K]).view(N, K)

    @property
    def stored(self):
        """packed, code, absmax, blocksize, as launchers take them."""
        return self.packed, self.code, self.absmax, self.blocksize


def check_dequantize(weight, dtype, out=None):
    from csrc_triton.quantized.fourbit import dequantize

    w = dequantize(*weight.stored, weight.shape, dtype, weight.nested, out)
    assert w.dtype == dtype and torch.equal(w, weight.w.to(dtype))
    return w


SHAPES = [(64, 128), (48, 96), (33, 70), (17, 5), (1, 1), (3, 4099)]


class TestDequantize:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("quant_type, nested", [("nf4", None), ("nf4", 256), ("fp4", None), ("fp4", 16)])
    @pytest.mark.parametrize("N, K", SHAPES)
    def test_bit_for_bit(self, N, K, quant_type, nested, dtype):
        """Blocks that straddle rows, a last block that is not full, a last byte of which half is used."""
        for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            check_dequantize(Quantized(N, K, blocksize, nested, quant_type), dtype)

    @pytest.mark.parametrize("nested", [None, 256])
    @pytest.mark.parametrize("blocksize", [32, 64, 4096])
    @pytest.mark.parametrize("N, K", SHAPES)
    def test_into_a_wider_workspace(self, N, K, blocksize, nested):
        """Rows are further apart than K elements; what lies between them stays as it was."""
        memory = torch.full((N, K + 24), 7.0, dtype=torch.bfloat16, device=DEVICE)
        out = memory[:, :K]
        w = check_dequantize(Quantized(N, K, blocksize, nested), torch.bfloat16, out)
        assert w is out and (memory[:, K:] == 7).all()

    def test_into_a_dense_workspace(self):
        out = torch.empty(10, 60, device=DEVICE)
        assert check_dequantize(Quantized(10, 60), torch.float32, out) is out

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_bitsandbytes_makes(self, dtype):
        """Its quantizer's output; K a multiple of the block size, since elsewhere its CPU library is wrong."""
        functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
        from csrc_triton.quantized.fourbit import Nested, dequantize

        w = torch.randn(48, 128, device=DEVICE, dtype=dtype)
        for quant_type, nested, blocksize in itertools.product(CODES, (False, True), (32, 64, 128)):
            packed, state = functional.quantize_4bit(
                w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
            )
            state2 = state.state2
            more = Nested(state2.code, state2.absmax, state.offset, state2.blocksize) if nested else None
            got = dequantize(packed.flatten(), state.code, state.absmax, blocksize, (48, 128), dtype, more)
            assert torch.equal(got, functional.dequantize_4bit(packed, state))

    def test_sum_and_product_are_rounded_one_by_one(self):
        """Numbers that a fused multiply-add gives another result for."""
        from csrc_triton.quantized.fourbit import Nested, dequantize

        factor = torch.tensor([1.0 + 2**-12], device=DEVICE)
        nested = Nested(factor.expand(256).contiguous(), factor, -factor.square(), 256)
        code, byte = torch.ones(16, device=DEVICE), torch.zeros(32, dtype=torch.uint8, device=DEVICE)
        assert (factor.double() * factor.double() - factor.square().double()).item() != 0
        w = dequantize(byte, code, byte[:1], 64, (1, 64), torch.float32, nested)
        assert (w == 0).all()

    def test_empty(self):
        from csrc_triton.quantized.fourbit import dequantize

        weight = Quantized(1, 1)
        for shape in ((0, 5), (5, 0)):
            assert dequantize(*weight.stored, shape, torch.float16).shape == shape

    def test_one_launch(self, launches):
        check_dequantize(Quantized(33, 70, 64, 256), torch.bfloat16)
        assert launches == ["fourbit"]

    def test_every_candidate(self, force):
        """On a size that needs several programs and does not fill the last one."""
        from csrc_triton.quantized.fourbit import CANDIDATES

        for candidate, blocksize in itertools.product(CANDIDATES, (32, 4096)):
            force("fourbit", candidate.config)
            dtype = torch.float32 if candidate.itemsize == 4 else torch.bfloat16
            check_dequantize(Quantized(91, 101, blocksize, 256), dtype)
            memory = torch.empty(91, 120, dtype=dtype, device=DEVICE)
            check_dequantize(Quantized(91, 101, blocksize), dtype, memory[:, :101])

    def test_offsets_beyond_32_bits(self):
        """Of elements, with a distance of rows that fits; in memory that is reserved and not filled."""
        apart = 2**30 + 8
        storage = torch.UntypedStorage(2 * apart * 2 + 4096, device=DEVICE)
        memory = torch.tensor([], dtype=torch.bfloat16, device=DEVICE).set_(storage)
        for K in (64, 70):
            check_dequantize(Quantized(3, K), torch.bfloat16, memory.as_strided((3, K), (apart, 1)))


def exact_linear(x, weight, bias, a, b, scale):
    y = x.double() @ weight.w.double().T
    y = y if a is None else y + scale * (x.double() @ a.double().T) @ b.double().T
    return y if bias is None else y + bias.double()


def same_linear(x, weight, bias, a, b, scale):
    """Plain torch in x's dtype, the weight dequantized to it, adapters cast as under autocast."""
    y = torch.nn.functional.linear(x, weight.w.to(x.dtype), bias)
    return y if a is None else y + scale * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T


def draw_linear(M, N, K, R, dtype, adapter_dtype=torch.float32):
    """x, bias, a, b."""
    x, bias = torch.randn(M, K, device=DEVICE).to(dtype), torch.randn(N, device=DEVICE).to(dtype)
    if R == 0:
        return x, bias, None, None
    a, b = torch.randn(R, K, device=DEVICE) / K**0.5, torch.randn(N, R, device=DEVICE) / R**0.5
    return x, bias, a.to(adapter_dtype), b.to(adapter_dtype)


def check_linear(weight, x, bias, a, b):
    from csrc_triton.quantized.fourbit_linear import fourbit_linear

    N = weight.shape[0]
    y = fourbit_linear(x, *weight.stored, N, weight.quant_type, weight.nested, bias, a, b, 1.7)
    assert y.dtype == x.dtype
    arguments = (x, weight, bias, a, b, 1.7)
    assert_as_accurate("y", y, same_linear(*arguments), exact_linear(*arguments))
    return y


class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("M, N, K, R", [(1, 50, 64, 8), (3, 33, 128, 16), (17, 70, 192, 5), (64, 1, 64, 40)])
    def test_forward(self, M, N, K, R, dtype):
        for quant_type, nested in (("nf4", None), ("nf4", 4), ("fp4", 256)):
            check_linear(Quantized(N, K, 64, nested, quant_type), *draw_linear(M, N, K, R, dtype))

    @pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
    def test_every_block_size(self, blocksize):
        K = max(blocksize, 96 if blocksize == 32 else 256)
        check_linear(Quantized(40, K, blocksize, 4), *draw_linear(5, 40, K, 4, torch.bfloat16))

    def test_small_blocks_leave_the_configuration_of_others_alone(self):
        from csrc_triton.common.tuning import config_for

        x, bias, a, b = draw_linear(5, 40, 128, 4, torch.bfloat16)
        check_linear(Quantized(40, 128, 64), x, bias, a, b)
        before = dict(config_for("fourbit_linear", x, 5, 40, 128, 4))
        check_linear(Quantized(40, 128, 32), x, bias, a, b)
        assert config_for("fourbit_linear", x, 5, 40, 128, 4) == before and before["BLOCK_K"] > 32

    def test_without_an_update_without_a_bias(self):
        weight = Quantized(40, 128)
        x, bias, a, b = draw_linear(5, 40, 128, 4, torch.bfloat16, torch.bfloat16)
        for arguments in ((x, None, None, None), (x, bias, None, None), (x, None, a, b)):
            check_linear(weight, *arguments)

    def test_strides(self):
        """Rows of x with gaps, transposed adapters."""
        x, bias, a, b = draw_linear(5, 40, 128, 4, torch.float32)
        x = torch.randn(5, 200, device=DEVICE)[:, 3:131]
        check_linear(Quantized(40, 128), x, bias, a.T.contiguous().T, b.T.contiguous().T)

    @pytest.mark.parametrize("M, N", [(0, 50), (3, 0)])
    def test_empty(self, M, N):
        from csrc_triton.quantized.fourbit_linear import fourbit_linear

        weight, x = Quantized(max(N, 1), 64), torch.randn(M, 64, device=DEVICE)
        assert fourbit_linear(x, *weight.stored, N, "nf4").shape == (M, N)

    def test_one_launch(self, launches):
        check_linear(Quantized(50, 64, 64, 256), *draw_linear(3, 50, 64, 8, torch.bfloat16))
        assert launches == ["fourbit_linear"]

    def test_what_it_is_not_for(self):
        from csrc_triton.quantized.fourbit_linear import fits, fourbit_linear

        weight, x = Quantized(3, 96), torch.randn(2, 96, device=DEVICE)
        with pytest.raises(ValueError, match="got M = 2, rank 0, K = 96 and blocksize 64"):
            fourbit_linear(x, *weight.stored, 3, "nf4")
        assert fits(64, 128, 128, 64)
        assert not fits(65, 128, 128, 64) and not fits(64, 128, 129, 64) and not fits(64, 128, 128, 256)

    def test_every_candidate(self, force):
        """On sizes that need several tiles in each direction and fill none."""
        from csrc_triton.quantized.fourbit_linear import CANDIDATES

        for candidate in CANDIDATES:
            force("fourbit_linear", candidate.config)
            dtype = torch.float32 if candidate.itemsize == 4 else torch.bfloat16
            M = min(64, candidate.blocks["BLOCK_M"] + 3)
            check_linear(Quantized(145, 256), *draw_linear(M, 145, 256, 20, dtype))


class TestDecode:
    """Few rows in two launches, with K split."""

    @staticmethod
    def check(weight, x, bias, a, b):
        from csrc_triton.quantized.fourbit_decode import decodes, fourbit_decode

        assert decodes(x, 0 if a is None else a.shape[0], weight.blocksize)
        N, arguments = weight.shape[0], (x, weight, bias, a, b, 1.7)
        y = fourbit_decode(x, *weight.stored, N, weight.quant_type, weight.nested, bias, a, b, 1.7)
        assert y.dtype == x.dtype
        assert_as_accurate("y", y, same_linear(*arguments), exact_linear(*arguments))

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("M, N, K, R", [(1, 50, 64, 8), (3, 33, 1344, 40), (16, 1, 2048, 5)])
    def test_forward(self, M, N, K, R, dtype):
        """Steps that are not whole, planes of several steps, the last of them short."""
        for quant_type, nested in (("nf4", None), ("nf4", 4), ("fp4", 256)):
            self.check(Quantized(N, K, 64, nested, quant_type), *draw_linear(M, N, K, R, dtype))

    @pytest.mark.parametrize("blocksize", [32, 128])
    def test_every_block_size(self, blocksize):
        self.check(Quantized(40, 640, blocksize, 4), *draw_linear(5, 40, 640, 4, torch.bfloat16))

    def test_without_an_update_without_a_bias(self):
        x, bias, a, b = draw_linear(5, 40, 128, 4, torch.bfloat16, torch.bfloat16)
        for arguments in ((x, None, None, None), (x, bias, None, None), (x, None, a, b)):
            self.check(Quantized(40, 128), *arguments)

    def test_strides(self):
        """Rows of x with gaps, transposed adapters."""
        _, bias, a, b = draw_linear(5, 40, 128, 4, torch.bfloat16)
        x = torch.randn(5, 200, device=DEVICE).bfloat16()[:, 3:131]
        self.check(Quantized(40, 128), x, bias, a.T.contiguous().T, b.T.contiguous().T)

    def test_every_candidate(self, force):
        from csrc_triton.quantized.fourbit_decode import CANDIDATES

        for candidate in CANDIDATES:
            force("fourbit_decode", candidate.config)
            self.check(Quantized(145, 1024), *draw_linear(13, 145, 1024, 20, torch.bfloat16))

    def test_launches(self, launches):
        self.check(Quantized(50, 64, 64, 256), *draw_linear(3, 50, 64, 8, torch.bfloat16))
        assert launches == ["fourbit_decode", "fourbit_finish"]


def check_mixed(weight, adapters, slots, x, bias):
    from csrc_triton.quantized.fourbit_linear import fourbit_mixed

    plan, site = functional.mixed_plan(slots.to(DEVICE), len(adapters.ranks), 2), adapters.site
    counters = plan.counters[site.index]
    y = fourbit_mixed(
        x, *weight.stored, weight.shape[0], weight.quant_type, weight.nested, bias, site.addresses, site.ranks,
        site.scales, site.dtype, site.max_rank, plan.order, plan.blocks, plan.block_rows, counters,
    )  # fmt: skip
    exact = update(in_double(adapters), slots, x.double(), exact_linear(x, weight, bias, None, None, 0.0))
    assert_as_accurate("y", y, update(adapters, slots, x, same_linear(x, weight, bias, None, None, 0.0)), exact)
    assert not counters.any(), "counters are left at zero"
    return y


class TestMixed:
    @pytest.mark.parametrize("dtype, adapter_dtype", [(t, t) for t in DTYPES] + [(torch.bfloat16, torch.float32)])
    @pytest.mark.parametrize("M", [1, 3, 16, 37, 64])
    def test_every_mix(self, M, dtype, adapter_dtype):
        """Odd ranks, slots without an adapter, rows without one, ids beyond the table."""
        adapters, weight = Adapters(128, 50, adapter_dtype, RANKS, DEVICE, index=1), Quantized(50, 128, 64, 4)
        for name in ("mixed", "none", "one", "distinct") if dtype == torch.float32 else ("mixed",):
            x, bias, _, _ = draw_linear(M, 50, 128, 0, dtype)
            check_mixed(weight, adapters, mixes(M, len(RANKS))[name], x, bias)

    def test_ranks_beyond_one_block_and_no_bias(self):
        adapters = Adapters(1152, 33, torch.bfloat16, (100, 128, 3), DEVICE)
        x, _, _, _ = draw_linear(20, 33, 1152, 0, torch.bfloat16)
        check_mixed(Quantized(33, 1152, 128), adapters, torch.arange(20) % 3, x, None)

    def test_a_row_depends_on_no_other(self):
        """The same bits of a row, whatever the adapters of the others and wherever it stands."""
        M, row = 37, 11
        adapters, weight = Adapters(128, 50, torch.bfloat16, RANKS, DEVICE), Quantized(50, 128)
        x, bias, _, _ = draw_linear(M, 50, 128, 0, torch.bfloat16)
        slots = torch.arange(M) % len(RANKS)
        slots[row] = 4
        expected = check_mixed(weight, adapters, slots, x, bias)
        others = torch.full((M,), 4)
        assert torch.equal(check_mixed(weight, adapters, others, x, bias)[row], expected[row])
        order = torch.randperm(M)
        got = check_mixed(weight, adapters, slots[order], x[order.to(DEVICE)], bias)
        assert torch.equal(got, expected[order.to(DEVICE)])

    @pytest.mark.parametrize("M, N", [(0, 50), (3, 0)])
    def test_empty(self, M, N):
        weight = Quantized(max(N, 1), 64)
        weight.shape, weight.w = (N, 64), weight.w[:N]
        x, bias, _, _ = draw_linear(M, N, 64, 0, torch.float32)
        check_mixed(weight, Adapters(64, N, torch.float32, RANKS, DEVICE), torch.arange(M), x, bias)

    def test_one_launch(self, launches):
        adapters, weight = Adapters(64, 50, torch.float32, RANKS, DEVICE), Quantized(50, 64)
        x, bias, _, _ = draw_linear(9, 50, 64, 0, torch.float32)
        check_mixed(weight, adapters, torch.arange(9) % 8, x, bias)
        assert launches == ["fourbit_mixed"]

    def test_every_candidate(self, force):
        from csrc_triton.quantized.fourbit_linear import MIXED_CANDIDATES

        for candidate in MIXED_CANDIDATES:
            force("fourbit_mixed", candidate.config)
            dtype = torch.float32 if candidate.itemsize == 4 else torch.bfloat16
            adapters = Adapters(256, 145, dtype, (40, 3, 0, 64), DEVICE)
            M = candidate.blocks["BLOCK_M"] - 3
            x, bias, _, _ = draw_linear(M, 145, 256, 0, dtype)
            check_mixed(Quantized(145, 256), adapters, torch.arange(M) % 5, x, bias)


def run_ptx(text, source):
    """What the decoder's instructions do to one register, as the PTX manual defines them, in the order of the text."""
    registers = {"$4": source}

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    def prmt(a, b, selector):
        table = (a | b << 32).to_bytes(8, "little")
        chosen = [selector >> 4 * i & 15 for i in range(4)]
        assert all(index < 8 for index in chosen), "the top bit of a selector would replicate a sign"
        return int.from_bytes(bytes(table[index] for index in chosen), "little")

    def lop3(a, b, c, table):
        bits = (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1 for i in range(32))
        return sum(bit << i for i, bit in enumerate(bits))

    does = {
        "and.b32": lambda a, b: a & b, "shr.b32": lambda a, b: a >> b, "mov.b32": lambda a: a, "prmt.b32": prmt,
        "lop3.b32": lop3,
    }  # fmt: skip
    written = []
    for line in text.strip("{ }").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if operation and operation != ".reg":
            target, *names = [name.strip() for name in operands.split(",")]
            assert not ("$4" in names and any(name.startswith("$") for name in written)), "$4 may be overwritten"
            arguments = [value(name) & 0xFFFF if i == 2 and operation == "prmt.b32" else value(name)
                         for i, name in enumerate(names)]  # fmt: skip
            registers[target] = does[operation](*arguments)
            written.append(target)
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", CODES)
def test_decoder_in_ptx(quant_type, dtype):
    """Every byte in every place, beside others: the codes of its nibbles, rounded to the dtype, in their order."""
    from csrc_triton.quantized import fourbit_codes

    assert fourbit_codes.CODES[quant_type] == tuple(CODES[quant_type])
    text = fourbit_codes.prmt_decoder(fourbit_codes.CODES[quant_type], dtype)
    rounded = torch.tensor(CODES[quant_type]).to(dtype).view(torch.uint16).tolist()
    for first in range(256):
        data = [first, (first * 7 + 13) % 256, 255 - first, (first * 31 + 5) % 256]
        got = run_ptx(text, int.from_bytes(bytes(data), "little"))
        codes = [half for register in got for half in (register & 0xFFFF, register >> 16)]
        assert codes == [rounded[byte >> 4] for byte in data] + [rounded[byte & 15] for byte in data]


def test_codes_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for name, code in CODES.items():
        assert torch.equal(torch.tensor(code), bnb.get_4bit_type(name, device="cpu"))
