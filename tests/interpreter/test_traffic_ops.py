"""Public functions: which kernels run in which order, and what must move beside the ``bytes()`` of the bench's cases.

The bench's rooflines stand on these; what a path moves besides is listed tensor by tensor. Further lists of launches:
test_kernels.py (every combination of gradients), test_mixed.py (every mix of adapters, embeddings), test_prefix.py
(which attention, each gradient alone).
"""

from typing import Any

import pytest
import torch
from lora_inputs import make
from mixed_sites import Adapters
from prefix_oracle import draw as draw_attention
from test_fourbit import Quantized
from test_traffic import BACKWARD, BF16, DEVICE, FP32, INT, MIXED, lora_op, memory_of, seed
from traffic import COUNTED, Launch, counting
from traffic_models import check

from bench.cases.kinds import MixedOpCase, OpCase, PrefixSiteCase, QuantSiteCase, QuantWeightCase
from peft_fast.ops import functional
from peft_fast.quantized import functional as quantized_functional, weights as quant


def moved(launches: list[Launch]) -> int:
    """Bytes that must move if no launch finds anything in a cache."""
    check(launches)
    return sum(launch.must_move for launch in launches)


def assert_moved(launches: list[Launch], case_bytes: float, **more: int) -> None:
    """The case's bytes and those of ``more``, each named for what it is."""
    if COUNTED:
        assert moved(launches) - case_bytes == sum(more.values()), more


def kernels(launches: list[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


M, N, K, R = 40, 300, 96, 16
FORWARD = {"split": ["lora_shrink", "lora_gemm"], "one_launch": ["lora_one_launch"], "addmm": ["lora_shrink"]}
# dB and planes of dS in one pass over dY, dS their sum, dA, dX
GRADIENTS = ["lora_grad", "sum_planes", "lora_grad"]


class TestLora:
    @pytest.mark.parametrize("p", [0.0, 0.3])
    @pytest.mark.parametrize("biased", [True, False], ids=["bias", ""])
    @pytest.mark.parametrize("implementation", FORWARD)
    def test_forward(self, implementation, biased, p):
        x, w, a, b, bias = make(M, N, K, R, BF16, adapter_dtype=FP32, device=DEVICE)
        options = dict(dropout_p=p, seed=seed() if p else None, implementation=implementation)
        with torch.no_grad(), counting() as launches:
            functional.lora_linear(x, w, a, b, 2.0, bias if biased else None, **options)
        assert kernels(launches) == FORWARD[implementation]
        more = dict(bias=2 * N * biased, mask=M * K // 8 * (p > 0), seed=8 * (p > 0), s_written=2 * M * R)
        if implementation == "split":
            more |= dict(x_again=2 * M * K, s_read=2 * M * R)
        if implementation != "addmm":  # the vendor's products are not ours to count
            assert_moved(launches, OpCase("", K, N, M, R, "fwd", "bf16", "fp32").bytes(lora=True), **more)

    @pytest.mark.parametrize("p", [0.0, 0.3])
    @pytest.mark.parametrize("implementation", FORWARD)
    def test_training(self, implementation, p):
        with counting() as launches:
            lora_op(implementation, M, N, K, R, BF16, p, False)
        last = "lora_expand" if implementation == "addmm" else "lora_gemm"
        assert kernels(launches) == [*FORWARD[implementation], *GRADIENTS, last]
        s, mask, blocks = 2 * M * R, M * K // 8 * (p > 0), -(-N // 128)
        more = dict(
            s_written_and_read_for_db=2 * s, dy_again=2 * M * N, planes_of_ds=2 * blocks * 4 * M * R,
            ds_written_and_read_for_da_and_dx=3 * s, mask_written_and_read_twice=3 * mask, seed=8 * (p > 0),
        )  # fmt: skip
        if implementation == "split":
            more |= dict(x_again=2 * M * K, s_read=s)
        if implementation != "addmm":
            assert_moved(launches, OpCase("", K, N, M, R, "train", "bf16", "fp32", p).bytes(lora=True), **more)

    def test_update(self):
        x, _, a, b, _ = make(M, N, K, R, BF16, device=DEVICE)
        base = torch.randn(M, N, device=DEVICE).bfloat16()
        leaves = [t.requires_grad_() for t in (x, a, b)]
        with counting() as launches:
            y = functional.lora_update(base, x, a, b, 2.0, implementation="split")
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert check(launches) == ["lora_shrink", "lora_expand", *GRADIENTS, "lora_expand"]

    def test_sites_that_share_x(self):
        """The second site's s costs no pass over x."""
        x, w, *_ = make(M, N, K, R, BF16, device=DEVICE)
        pairs = [make(M, N, K, R, BF16, device=DEVICE)[2:4] for _ in range(2)]
        sites = [functional.LoraSite(w, a, b, 2.0) for a, b in pairs]
        with torch.no_grad(), counting() as launches:
            functional.lora_linear_group(x, sites, implementation="split")
        case = OpCase("", K, N, M, R).bytes(lora=True)
        assert kernels(launches) == ["lora_shrink", "lora_gemm", "lora_gemm"]
        assert_moved(launches, 2 * case, s_written_and_read=2 * 2 * 2 * M * R, x_again=2 * M * K)


class TestMixed:
    @pytest.mark.parametrize("implementation", ["split", "one_launch"])
    def test_linear(self, implementation):
        """Ranks 16, 4, 64: B of rank 4 is read with what fills its rows up to 8."""
        case = MixedOpCase("", K, N, M, 3)
        adapters, slots = Adapters(K, N, BF16, case.ranks, DEVICE), torch.tensor(case.slots, device=DEVICE)
        x, w, *_ = make(M, N, K, 1, BF16, device=DEVICE)
        plan = functional.mixed_plan(slots, 3, 1)
        with counting(**memory_of(adapters)) as launches:
            functional.lora_linear_mixed(x, w, adapters.site, plan, implementation=implementation)
        assert kernels(launches) == MIXED[implementation]
        entries, used, parts = len(plan.blocks), int((plan.blocks[:, 0] >= 0).sum()), 4
        if implementation == "split":
            parts = 1
            tables = dict(x_again=2 * M * K, shrink=4 * (3 * entries + M + 3) + 8 * 3, gemm=4 * (2 * M + 6) + 8 * 3)
        else:
            tables = dict(blocks=4 * (entries + 2 * used), order=4 * M, ranks_scales_addresses=3 * (4 + 4 + 16))
            tables |= dict(counters_set_to_zero=4 * 4)
        ranks = [case.ranks[slot] for slot in case.slots]
        planes = 4 * parts * (sum(ranks) + sum(max(8, rank) for rank in ranks))
        assert_moved(launches, case.bytes(lora=True), fill=2 * 4 * N, planes_written_and_read=planes, **tables)

    def test_update(self):
        adapters, x = Adapters(K, N, BF16, (16, 4), DEVICE), torch.randn(M, K, device=DEVICE).bfloat16()
        plan = functional.mixed_plan(torch.arange(M, device=DEVICE) % 2, 2, 1)
        with counting(**memory_of(adapters)) as launches:
            functional.lora_update_mixed(
                torch.zeros(M, N, device=DEVICE), x, adapters.site, plan, implementation="split"
            )
        assert check(launches) == MIXED["grouped"]


class TestAttention:
    ROWS, HEADS, KV, D = 3, 4, 2, 32

    def run(self, case: PrefixSiteCase) -> list[Launch]:
        B, H, KV, D = case.rows, case.heads, case.kv_heads, case.head_size
        sizes = dict(B=B, Hq=H, Hkv=KV, L=case.queries, S=case.tokens, D=D, T=case.prefix * case.prefixes)
        leaves = [t.requires_grad_() for t in draw_attention(FP32, DEVICE, **sizes)]
        options: dict[str, Any] = dict(causal_offset=case.tokens - case.queries)
        if case.prefixes > 1:
            lengths = torch.full((B,), case.prefix, **INT)
            starts = torch.arange(B, **INT) % case.prefixes * case.prefix
            options |= dict(starts=starts, lengths=lengths, max_length=case.prefix)
            options |= dict(order=starts.argsort(stable=True).int())
        with counting() as launches:
            out, _ = functional.prefix_attention(*leaves, **options, implementation="kernel")
            if case.mode == "train":
                torch.autograd.grad(out, leaves, torch.ones_like(out))
        return launches

    def case(self, mode: str, tokens: int, prefixes: int = 1) -> PrefixSiteCase:
        return PrefixSiteCase(mode, self.ROWS, tokens, 20, "fp32", self.HEADS, self.KV, self.D, prefixes)

    @pytest.mark.parametrize("prefixes", [1, 2])
    def test_forward(self, prefixes):
        case = self.case("fwd", 33, prefixes)
        launches = self.run(case)
        assert kernels(launches) == ["prefix_fwd"]
        tables = 2 * 4 * self.ROWS * (prefixes > 1)
        assert_moved(launches, case.bytes(prefix=True), lse=4 * self.ROWS * self.HEADS * 33, starts_and_lengths=tables)

    @pytest.mark.parametrize("prefixes", [1, 2])
    def test_decode(self, prefixes):
        case = self.case("decode", 130, prefixes)
        launches = self.run(case)
        assert kernels(launches) == ["prefix_decode", "prefix_merge"]
        queries = self.ROWS * self.HEADS
        parts = launches[0]["parts"].shape[0] * 4 * queries * (self.D + 1)
        tables = 3 * 4 * self.ROWS * (prefixes > 1)
        assert_moved(
            launches, case.bytes(prefix=True), parts_written_and_read=2 * parts, lse=4 * queries, rows=tables
        )  # fmt: skip

    def test_training(self):
        """dq, dk and dv, and the prefix's gradient are a kernel each, so that none needs atomics."""
        case = self.case("train", 33)
        launches = self.run(case)
        assert kernels(launches) == ["prefix_fwd", *BACKWARD]
        queries, own, slots = self.ROWS * self.HEADS * 33, 2 * self.ROWS * self.KV * 33, 2 * self.KV * 20
        shares = launches[4].grid[2]
        assert_moved(
            launches, case.bytes(prefix=True), q_twice_more=2 * 4 * self.D * queries,
            dout_three_times_more=3 * 4 * self.D * queries, own_again=4 * self.D * own, slots_again=4 * self.D * slots,
            planes_written_and_read=2 * shares * 4 * self.D * slots, lse_written_and_read=2 * 4 * queries,
            sums_written_and_read_by_three=4 * 2 * 4 * queries,
        )  # fmt: skip


class TestQuantized:
    CODE, NESTED = 4 * 16, 4 * 256 + 4  # of 4-bit weights: the table of codes; that of factors and their offset

    @pytest.fixture(autouse=True)
    def _forced(self, monkeypatch):
        monkeypatch.setenv("PEFT_FAST_QUANT", "kernel")

    def weight(self, N, K):
        """NF4 with double quantization, every entry of its tables in use."""
        made = Quantized(N, K, 64, 256)
        made.absmax[:256] = torch.arange(256, device=DEVICE).byte()
        return quant.FourBit(*made.stored[:3], *made.nested[:3], "nf4", 64, 256, N, K, BF16)

    @pytest.mark.parametrize("dtype, name", [(BF16, "bf16"), (FP32, "fp32")], ids=str)
    def test_dequantize(self, dtype, name):
        w = self.weight(128, 256)
        with counting() as launches:
            w.dequantize(dtype)
        assert kernels(launches) == ["fourbit"]
        assert_moved(launches, QuantWeightCase(128, 256, name).bytes(), tables=self.CODE + self.NESTED)

    @pytest.mark.parametrize("biased", [True, False], ids=["bias", ""])
    def test_inference(self, biased):
        w, (x, _, a, b, bias) = self.weight(64, 256), make(5, 64, 256, R, BF16, adapter_dtype=FP32, device=DEVICE)
        with torch.no_grad(), counting() as launches:
            quantized_functional.lora_linear_quantized(x, w, a, b, 2.0, bias if biased else None)
        case = QuantSiteCase("", 256, 64, 5).bytes(lora=True)
        assert kernels(launches) == ["fourbit_decode", "fourbit_finish"]
        planes = 2 * 4 * 5 * (64 + R)  # one of y and of s, written and read
        assert_moved(launches, case, tables=self.CODE + self.NESTED, planes=planes, bias=2 * 64 * biased)

    @pytest.mark.parametrize("M, expected", [(5, ["fourbit_mixed"]), (70, ["fourbit", *MIXED["grouped"]])])
    def test_mixed(self, M, expected):
        w, adapters = self.weight(64, 256), Adapters(256, 64, FP32, (4, 16), DEVICE)
        plan, x = functional.mixed_plan(torch.arange(M, device=DEVICE) % 3, 2, 1), torch.randn(M, 256, device=DEVICE)
        with torch.no_grad(), counting(**memory_of(adapters)) as launches:
            quantized_functional.lora_linear_mixed_4bit(x, w, adapters.site, plan)
        assert check(launches) == expected

    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_training(self, p):
        """The weight is dequantized for the forward and again for the backward: written and read each time."""
        N, K = 64, 256
        w, (x, _, a, b, _) = self.weight(N, K), make(M, N, K, R, BF16, adapter_dtype=FP32, device=DEVICE)
        leaves, options = [t.requires_grad_() for t in (x, a, b)], dict(dropout_p=p, seed=seed() if p else None)
        with counting() as launches:
            y = quantized_functional.lora_linear_quantized(x, w, a, b, 2.0, implementation="split", **options)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        forward, backward = ["fourbit", *FORWARD["split"]], ["fourbit", "lora_grad", "lora_grad", "lora_gemm"]
        assert kernels(launches) == forward + backward
        assert_moved(
            launches, QuantSiteCase("", K, N, M, "train", dropout=p).bytes(lora=True),
            w_written_and_read_twice=4 * 2 * N * K, tables_twice=2 * (self.CODE + self.NESTED), x_again=2 * M * K,
            dy_again=2 * M * N, s_written_and_read_twice=3 * 2 * M * R, ds_written_and_read_twice=3 * 2 * M * R,
            mask_written_and_read_twice=3 * M * K // 8 * (p > 0), seed=8 * (p > 0),
        )  # fmt: skip

    @pytest.mark.parametrize("biased", [True, False], ids=["bias", ""])
    @pytest.mark.parametrize("threshold", [0.0, 2.5])
    def test_int8(self, biased, threshold):
        x, _, a, b, bias = make(M, N, K, R, BF16, adapter_dtype=FP32, device=DEVICE)
        w = quant.Int8(torch.ones(N, K, dtype=torch.int8, device=DEVICE), torch.ones(N, device=DEVICE))
        with torch.no_grad(), counting() as launches:
            quantized_functional.lora_linear_int8(x, w, a, b, 2.0, bias if biased else None, threshold)
        case = QuantSiteCase("", K, N, M, kind="int8").bytes(lora=True)
        assert kernels(launches) == ["int8_quantize_rows", "int8_gemm"]
        assert_moved(
            launches, case, x_in_int8_written_and_read=2 * M * K, its_factors=2 * 4 * M,
            planes_of_s_written_and_read=8 * 2 * 4 * M * R, bias=2 * N * biased,
        )  # fmt: skip
