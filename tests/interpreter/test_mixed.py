"""Kernels of batches that mix adapters, through the public functions: every implementation against fp64, row by row."""

import itertools
from unittest import mock

import pytest
import torch
from mixed_sites import RANKS, Adapters, embedding_update, in_double, mixes, update
from torch.nn import functional as F

import csrc_triton.mixed.linear  # noqa: F401  its kernels' candidates
from csrc_triton.common import tuning
from numerics import assert_as_accurate
from peft_fast.ops import functional, lora_mixed as op, mixed_plan as plan_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L, K, N, V, D = len(RANKS), 72, 50, 29, 40
PAIRS = [  # x, adapters
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16),
]  # fmt: skip
IMPLEMENTATIONS = {
    "grouped": (1, 3, 16, 37, 64, 130, 600),
    "split": (1, 3, 16, 37, 64, 130),
    "one_launch": (1, 3, 16, 37, 64),
}
LINEAR = [(name, M) for name, Ms in IMPLEMENTATIONS.items() for M in Ms]


def plan_of(slots, capacity=L):
    return functional.mixed_plan(slots.to(DEVICE), capacity, 2)


def draw(M, dtype, K=K, N=N):
    x, w, bias = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    return [t.to(DEVICE, dtype) for t in (x, w, bias)]


def adapters_of(K, N, dtype, ranks=RANKS):
    return Adapters(K, N, dtype, ranks, DEVICE, index=1)


def check(adapters, slots, x, w, bias, implementation, name=""):
    plan = plan_of(slots, len(adapters.ranks))
    y = functional.lora_linear_mixed(x, w, adapters.site, plan, bias, implementation=implementation)
    exact = update(in_double(adapters), slots, x.double(), F.linear(x.double(), w.double(), bias.double()))
    assert_as_accurate(name, y, update(adapters, slots, x, F.linear(x, w, bias)), exact)
    assert not plan.counters.any(), "counters are left at zero"
    return y


@pytest.mark.parametrize("dtype, adapter_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("implementation, M", LINEAR)
def test_every_mix(implementation, M, dtype, adapter_dtype):
    """In a batch: odd ranks, slots without an adapter, rows without one, ids beyond the table and beyond int32."""
    adapters = adapters_of(K, N, adapter_dtype)
    names = ("mixed", "none", "one", "distinct") if dtype == torch.float32 and M <= 64 else ("mixed",)
    for name in names:
        check(adapters, mixes(M, L)[name], *draw(M, dtype), implementation, name)


class TestPlan:
    """The kernel against torch's operators: every element equal."""

    def check(self, slots, capacity, sites=3, rows=None):
        rows = rows or (16 if len(slots) <= 512 else 64)
        got = plan_op._plan(slots.to(DEVICE), capacity, sites, rows, "kernel")
        for name, mine, theirs in zip(
            ("slots", "order", "blocks", "counters"), got, plan_op._on_torch(slots, capacity, sites, rows), strict=True
        ):
            assert mine.dtype == torch.int32 and torch.equal(mine.cpu(), theirs), f"{name} of {slots}"

    @pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 32, 33, 63, 64, 65, 130, 257, 513, 1000, 1024])
    @pytest.mark.parametrize("capacity", [1, 8, 1000])
    def test_all_contents(self, M, capacity):
        for slots in (
            *mixes(M, capacity).values(),
            *(torch.full((M,), slot) for slot in (0, capacity - 1, capacity, -1)),
            torch.arange(M), torch.arange(M).flip(0), torch.randint(-2, capacity + 2, (M,)),
            torch.randint(-2, min(capacity, 3), (M,)),
        ):  # fmt: skip
            self.check(slots, capacity)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
    def test_dtypes_gaps_and_no_slots(self, dtype):
        self.check(torch.randint(0, 120, (80,)).to(dtype)[::2], 100)
        self.check(torch.arange(20, dtype=dtype), 0)
        self.check(torch.arange(20, dtype=dtype), 20, sites=700)
        self.check(torch.arange(1100, dtype=torch.int64)[:1] + 2**32, 4)  # slot 0 if it were cut off

    def test_blocks_of_other_sizes(self):
        for rows in (1, 5, 64):
            self.check(torch.randint(-1, 4, (100,)), 4, rows=rows)

    def test_one_launch(self, launches):
        plan_op._plan(torch.arange(20, device=DEVICE), 8, 2, 16, "kernel")
        assert launches == ["mixed_plan"]

    def test_the_choice(self):
        """Torch's operators on a CPU, for no rows, for many, and for more slots than its keys hold."""
        cpu, gpu = torch.empty(4, dtype=torch.int32), mock.Mock(is_cuda=True)
        assert plan_op._resolve(cpu, 8, 1, 16, "auto") == "torch"
        for M, capacity, expected in ((1, 8, "kernel"), (1024, 8, "kernel"), (0, 8, "torch"), (1025, 8, "torch"),
                                      (5, 1 << 20, "kernel"), (5, (1 << 20) + 1, "torch")):  # fmt: skip
            gpu.shape = (M,)
            with mock.patch.object(plan_op, "triton_failure", lambda device: ""):
                assert plan_op._resolve(gpu, capacity, 1, 16, "auto") == expected
            with mock.patch.object(plan_op, "triton_failure", lambda device: "no compiler"):
                assert plan_op._resolve(gpu, capacity, 1, 16, "auto") == "torch"

    def test_opcheck(self):
        slots = torch.arange(20, device=DEVICE)
        for M in (20, 0):
            torch.library.opcheck(plan_op._plan, (slots[:M], 8, 2, 16, "kernel" if M else "torch"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestEvery:
    def test_ranks_beyond_one_block_and_K_in_parts(self, implementation):
        adapters = adapters_of(1100, 33, torch.bfloat16, ranks=(100, 128, 3))
        check(adapters, torch.arange(20) % 3, *draw(20, torch.bfloat16, 1100, 33), implementation)

    def test_more_adapters_than_rows_and_one_alone(self, implementation):
        for ranks, slots in (([2] * 40, torch.arange(5) + 30), ([5], torch.zeros(20).long())):
            adapters = adapters_of(K, N, torch.float32, ranks)
            check(adapters, slots, *draw(len(slots), torch.float32), implementation)

    @pytest.mark.parametrize("M, N", [(0, 50), (3, 0)])
    def test_empty(self, implementation, M, N):
        (x, w, bias), adapters = draw(M, torch.float32, N=N), adapters_of(K, N, torch.float32)
        plan = plan_of(torch.arange(M))
        y = functional.lora_linear_mixed(x, w, adapters.site, plan, bias, implementation=implementation)
        assert y.shape == (M, N) and not plan.counters.any()

    def test_no_adapters(self, implementation):
        x, w, bias = draw(5, torch.float32)
        for ranks, capacity in (((0, 0), 2), ((), 0)):
            site = adapters_of(K, N, torch.float32, ranks).site if ranks else _empty_site()
            plan = plan_of(torch.arange(5), capacity)
            y = functional.lora_linear_mixed(x, w, site, plan, bias, implementation=implementation)
            torch.testing.assert_close(y, F.linear(x, w, bias))

    def test_strides_leading_sizes_and_no_bias(self, implementation):
        """Conv1D's transposed weight, x with gaps."""
        adapters, slots = adapters_of(K, N, torch.float32), torch.arange(24) % L
        x, w = torch.randn(2, 12, 2 * K, device=DEVICE)[:, :, ::2], torch.randn(K, N, device=DEVICE).T
        y = functional.lora_linear_mixed(x, w, adapters.site, plan_of(slots), implementation=implementation)
        expected = update(adapters, slots, x.reshape(24, K), F.linear(x, w).view(24, N))
        torch.testing.assert_close(y.view(24, N), expected)

    def test_a_row_depends_on_no_other(self, implementation):
        """The same bits of a row, whatever the adapters of the others and wherever it stands."""
        M, row = 37, 11
        adapters = adapters_of(K, N, torch.bfloat16)
        x, w, bias = draw(M, torch.bfloat16)

        def run(x, slots):
            return functional.lora_linear_mixed(
                x, w, adapters.site, plan_of(slots), bias, implementation=implementation
            )

        slots = torch.arange(M) % L
        slots[row] = 4
        expected = run(x, slots)
        for others in [*mixes(M, L).values(), torch.full((M,), 4)]:
            others[row] = 4
            assert torch.equal(run(x, others)[row], expected[row])
        for _ in range(3):
            order = torch.randperm(M)
            assert torch.equal(run(x[order.to(DEVICE)], slots[order]), expected[order.to(DEVICE)])

    def test_infinities_of_an_adapter_stay_in_its_rows(self, implementation):
        adapters, slots = adapters_of(K, N, torch.float32), torch.arange(20) % L
        x, w, bias = draw(20, torch.float32)
        before = functional.lora_linear_mixed(x, w, adapters.site, plan_of(slots), bias, implementation=implementation)
        adapters.ab[5][0].fill_(float("inf"))
        adapters.ab[5][1].fill_(float("nan"))
        after = functional.lora_linear_mixed(x, w, adapters.site, plan_of(slots), bias, implementation=implementation)
        assert torch.equal(after[slots != 5], before[slots != 5]) and after[slots == 5].isnan().all()

    def test_opcheck(self, implementation):
        adapters, (x, w, bias) = adapters_of(K, N, torch.float32), draw(9, torch.float32)
        tests = ("test_schema", "test_faketensor")
        arguments = (x, w, bias, *adapters.site, *plan_of(torch.arange(9) - 1), implementation)
        torch.library.opcheck(op.linear_mixed, arguments, test_utils=tests)


def _empty_site():
    made = [torch.empty(shape, dtype=dtype, device=DEVICE) for shape, dtype in
            (((0, 2), torch.int64), ((0,), torch.int32), ((0,), torch.float32))]  # fmt: skip
    return functional.MixedSite(*made, torch.float32, 16, 0)


class TestUpdate:
    @pytest.mark.parametrize("dtype, adapter_dtype", PAIRS, ids=str)
    @pytest.mark.parametrize("base_dtype", [None, torch.float32], ids=str)
    def test_takes_the_dtype_of_the_base_and_leaves_it_alone(self, dtype, adapter_dtype, base_dtype):
        adapters, slots = adapters_of(K, N, adapter_dtype), mixes(37, L)["mixed"]
        x = torch.randn(37, K, device=DEVICE).to(dtype)
        base = torch.randn(N, 37, device=DEVICE).T.to(base_dtype or dtype)
        before = base.clone()
        y = functional.lora_update_mixed(base, x, adapters.site, plan_of(slots), implementation="grouped")
        assert torch.equal(base, before) and y.dtype == base.dtype and y.is_contiguous()
        exact = update(in_double(adapters), slots, x.double(), base.double())
        assert_as_accurate("y", y, update(adapters, slots, x, base), exact)

    def test_rows_without_an_adapter_keep_their_bits(self):
        adapters, slots = adapters_of(K, N, torch.bfloat16), mixes(600, L)["none"]
        base = torch.randn(600, N, device=DEVICE)
        x = torch.randn(600, K, device=DEVICE).bfloat16()
        y = functional.lora_update_mixed(base, x, adapters.site, plan_of(slots), implementation="split")
        assert torch.equal(y, base)

    @pytest.mark.parametrize("dtype, adapter_dtype", PAIRS, ids=str)
    @pytest.mark.parametrize("M", [0, 1, 37, 600])
    def test_embedding(self, M, dtype, adapter_dtype):
        adapters, slots = adapters_of(V, D, adapter_dtype), mixes(M, L)["mixed"]
        base, ids = torch.randn(M, D, device=DEVICE).to(dtype), torch.randint(0, V, (M,))
        ids[::5] = torch.tensor([-1, V, 2**40, -(2**50)])[torch.arange(M)[::5] % 4]
        site, plan = adapters.site, plan_of(slots)
        y = functional.lora_embedding_mixed(base, ids.to(DEVICE), site, plan, V, implementation="grouped")
        exact = embedding_update(in_double(adapters), slots, ids, base.double())
        assert_as_accurate("y", y, embedding_update(adapters, slots, ids, base), exact)
        assert torch.equal(y[::5], base[::5])


class TestLaunches:
    @pytest.mark.parametrize(
        "implementation, expected",
        [
            ("grouped", ["mixed_shrink", "mixed_expand"]),
            ("split", ["mixed_shrink", "mixed_gemm"]),
            ("one_launch", ["mixed_one_launch"]),
        ],
    )
    def test_linear(self, implementation, expected, launches):
        """As many for any mix; the reference launches nothing."""
        adapters, (x, w, bias) = adapters_of(K, N, torch.float32), draw(20, torch.float32)
        for slots in mixes(20, L).values():
            plan = plan_of(slots)
            launches.clear()
            functional.lora_linear_mixed(x, w, adapters.site, plan, bias, implementation=implementation)
            assert launches == expected

    def test_others(self, launches):
        plan, base = plan_of(torch.arange(20) % L), torch.randn(20, D, device=DEVICE)
        ids = torch.randint(0, V, (20,), device=DEVICE)
        adapters = adapters_of(V, D, torch.float32)
        launches.clear()
        functional.lora_embedding_mixed(base, ids, adapters.site, plan, V, implementation="one_launch")
        assert launches == ["mixed_embedding", "mixed_expand"]
        launches.clear()
        x, adapters = torch.randn(20, K, device=DEVICE), adapters_of(K, D, torch.float32)
        functional.lora_update_mixed(base, x, adapters.site, plan, implementation="one_launch")
        assert launches == ["mixed_shrink", "mixed_expand"]


MIXED = [(kernel, c) for kernel, rows in sorted(tuning.CANDIDATES.items()) if kernel.startswith("mixed") for c in rows]


@pytest.mark.parametrize("kernel, candidate", MIXED, ids=[f"{kernel}-{c.label}" for kernel, c in MIXED])
def test_every_candidate(kernel, candidate, force):
    """On sizes that need several tiles in each direction and fill none, and for blocks of another size than its own."""
    force(kernel, candidate.config)
    dtype = torch.float32 if candidate.itemsize == 4 else torch.bfloat16
    implementation = {"mixed_one_launch": "one_launch", "mixed_gemm": "split"}.get(kernel, "grouped")
    largest = candidate.blocks["BLOCK_M"] if implementation == "one_launch" else 530
    adapters = adapters_of(150, 145, dtype, ranks=(40, 3, 0, 64))
    for M in {min(largest, M) for M in (13, 40, 530)} if implementation != "split" else (40, 140):
        slots = torch.arange(M) * 5 // M if M > 64 else torch.arange(M) % 5
        check(adapters, slots, *draw(M, dtype, 150, 145), implementation, f"M={M}")


def test_rows_too_many_for_one_launch():
    adapters, (x, w, bias) = adapters_of(K, N, torch.float32), draw(65, torch.float32)
    with pytest.raises(ValueError, match=r"one_launch' is for M <= 64 and ranks <= 128, got M = 65 and R = 64"):
        functional.lora_linear_mixed(x, w, adapters.site, plan_of(torch.arange(65)), bias, implementation="one_launch")


def test_every_kernel_has_a_default_everywhere():
    for arch, itemsize, (kernel, _) in itertools.product(tuning.ARCHS, (2, 4), MIXED):
        offered = list(tuning.candidates_for(kernel, arch, itemsize))
        for M, R in itertools.product((1, 64, 1 << 20), (16, 256)):
            assert any(M <= c.default_to and R <= c.max_rank for c in offered), (kernel, arch, itemsize, M, R)
