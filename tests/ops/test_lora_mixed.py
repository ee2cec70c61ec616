"""Batches that mix adapters, on the CPU path: values against fp64, gradients, plans, graphs (kernels: interpreter)."""

import pytest
import torch
import torch._dynamo.testing
from mixed_sites import RANKS, Adapters, embedding_update, in_double, mixes, update
from torch.nn import functional as F

from numerics import assert_as_accurate
from peft_fast.ops import functional, lora_mixed as op
from peft_fast.reference import mixed as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 3, 37, 130, 600]
L, K, N, V, D = len(RANKS), 72, 50, 29, 40


def plan_of(slots, capacity=L):
    return functional.mixed_plan(slots, capacity, 2)


def draw(M, dtype, K=K, N=N):
    return torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)


@pytest.mark.parametrize("M", SIZES)
@pytest.mark.parametrize("dtype, adapter_dtype", [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["linear", "update"])
def test_every_mix(M, dtype, adapter_dtype, fused):
    adapters = Adapters(K, N, adapter_dtype)
    for name, slots in mixes(M, L).items():
        x, w, bias = draw(M, dtype)
        plan, base = plan_of(slots), F.linear(x, w, bias)
        if fused:
            y = functional.lora_linear_mixed(x, w, adapters.site, plan, bias)
        else:
            y = functional.lora_update_mixed(base, x, adapters.site, plan)
        exact_base = F.linear(x.double(), w.double(), bias.double()) if fused else base.double()
        exact = update(in_double(adapters), slots, x.double(), exact_base)
        assert y.dtype == dtype
        assert_as_accurate(name, y, update(adapters, slots, x, base), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 37, 600])
def test_embedding(M, dtype):
    adapters = Adapters(V, D, dtype)
    for name, slots in mixes(M, L).items():
        base, ids = torch.randn(M, D).to(dtype), torch.randint(-3, V + 3, (M,))
        y = functional.lora_embedding_mixed(base, ids, adapters.site, plan_of(slots), V)
        exact = embedding_update(in_double(adapters), slots, ids, base.double())
        assert_as_accurate(name, y, embedding_update(adapters, slots, ids, base), exact)
        assert torch.equal(y[(ids < 0) | (ids >= V)], base[(ids < 0) | (ids >= V)])


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (2, 3, K)], ids=str)
def test_leading_sizes(shape):
    adapters, (_, w, bias) = Adapters(K, N, torch.float32), draw(1, torch.float32)
    x, slots = torch.randn(shape), torch.arange(6 if 0 not in shape else 0)
    y = functional.lora_linear_mixed(x, w, adapters.site, plan_of(slots), bias)
    assert y.shape == (*shape[:-1], N)
    torch.testing.assert_close(y.view(-1, N), update(adapters, slots, x.view(-1, K), F.linear(x, w, bias).view(-1, N)))


def test_a_base_of_another_dtype_is_left_alone():
    adapters, slots = Adapters(K, N, torch.float32), torch.arange(20) % L
    x, base = torch.randn(20, K).bfloat16(), torch.randn(N, 20).T
    before = base.clone()
    y = functional.lora_update_mixed(base, x, adapters.site, plan_of(slots))
    assert y.dtype == torch.float32 and y.is_contiguous() and torch.equal(base, before)
    torch.testing.assert_close(y, update(adapters, slots, x.float(), base))


def test_no_adapters_at_all():
    adapters = Adapters(K, N, torch.float32, ranks=(0, 0))
    x, w, bias = draw(5, torch.float32)
    y = functional.lora_linear_mixed(x, w, adapters.site, plan_of(torch.arange(5) % 2, 2), bias)
    assert torch.equal(y, F.linear(x, w, bias))


def test_autocast_takes_part_in_its_dtype():
    adapters, plan = Adapters(K, N, torch.float32), plan_of(torch.arange(20) % L)
    x, w, bias = draw(20, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.lora_linear_mixed(x, w, adapters.site, plan, bias)
    expected = functional.lora_linear_mixed(x.bfloat16(), w.bfloat16(), adapters.site, plan, bias.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


class TestPlan:
    @pytest.mark.parametrize("M, capacity", [(0, 4), (1, 1), (3, 0), (37, 8), (512, 3), (513, 8), (700, 1000)])
    def test_blocks_cover_every_row_once(self, M, capacity):
        for name, slots in mixes(M, max(capacity, 1)).items():
            known, order, blocks, counters, rows = functional.mixed_plan(slots, capacity, 5)
            none = (slots < 0) | (slots >= capacity)
            assert torch.equal(known.long(), slots.masked_fill(none, -1)), name
            expected = torch.sort(slots.masked_fill(none, capacity), stable=True).indices
            assert torch.equal(order.long(), expected), name
            assert rows == (16 if M <= 512 else 64)
            assert blocks.shape == ((M + rows - 1) // rows + min(M, max(capacity, 1)), 3)
            assert counters.shape == (5, 4) and not counters.any()
            assert {t.dtype for t in (known, order, blocks, counters)} == {torch.int32}
            seen = []
            for slot, first, count in blocks.tolist():
                if slot < 0:
                    assert (slot, first, count) == (-1, 0, 0)
                    continue
                assert 0 < count <= rows
                members = order[first : first + count].tolist()
                assert all(known[row] == slot for row in members)
                seen += members
            assert sorted(seen) == torch.arange(M)[~none].tolist(), name

    def test_no_value_is_read_on_the_host(self):
        """Shapes alone decide: it runs on meta tensors, which have no values."""
        plan = functional.mixed_plan(torch.empty(40, dtype=torch.int64, device="meta"), 8, 3)
        assert plan.blocks.shape == (3 + 8, 3) and plan.order.device.type == "meta"

    def test_errors(self):
        with pytest.raises(ValueError, match=r"slots must be \(M,\), one slot per row of x, got \(2, 3\)"):
            functional.mixed_plan(torch.zeros(2, 3, dtype=torch.int64), 4, 1)
        with pytest.raises(TypeError, match=r"must be integers, got torch\.float32"):
            functional.mixed_plan(torch.zeros(2), 4, 1)


class TestGroups:
    """``reference.lora_mixed``: rows that are grouped already."""

    ROWS = torch.tensor([3, 9, 0, 5, *range(10, 30), 4, 7])
    SLICES = (slice(0, 1), slice(1, 4), slice(4, 24), slice(24, 25), slice(25, 26))
    SLOTS = (0, 3, 4, 6, 7)

    def groups(self, adapters, leaves=None):
        """Groups, as slices of ROWS."""
        ab = leaves or adapters.ab
        return [(r, *ab[slot], adapters.scales[slot]) for r, slot in zip(self.SLICES, self.SLOTS, strict=True)]

    def slots(self):
        slots = torch.full((40,), -1)
        for rows, slot in zip(self.SLICES, self.SLOTS, strict=True):
            slots[self.ROWS[rows]] = slot
        return slots

    def test_slices_of_the_rows_themselves(self):
        adapters = Adapters(K, N, torch.float32)
        x, base = torch.randn(26, K), torch.randn(26, N)
        got = reference.lora_mixed(base.clone(), x, self.groups(adapters))
        shuffled = torch.randperm(26)
        back = reference.lora_mixed(base[shuffled], x[shuffled], self.groups(adapters), shuffled.argsort())
        torch.testing.assert_close(back, got[shuffled])
        assert not torch.equal(got, base)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("M", [40, 400])
    def test_values_in_place(self, dtype, adapter_dtype, M):
        adapters = Adapters(K, N, adapter_dtype)
        groups, x, base = self.groups(adapters), torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        slots = torch.cat([self.slots(), torch.full((M - 40,), -1)])
        y = base.clone()
        assert reference.lora_mixed(y, x, groups, self.ROWS) is y
        exact = update(in_double(adapters), slots, x.double(), base.double())
        assert_as_accurate("y", y, update(adapters, slots, x, base), exact)
        assert torch.equal(y[slots < 0], base[slots < 0])

    def test_no_groups(self):
        y = torch.randn(3, N)
        assert reference.lora_mixed(y, torch.randn(3, K), []) is y

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_gradients(self, dtype):
        adapters = Adapters(K, N, torch.float32)
        leaves = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in adapters.ab]
        x = torch.randn(40, K).to(dtype).requires_grad_()
        base = torch.randn(40, N).to(dtype).requires_grad_()
        y = reference.lora_mixed(base, x, self.groups(adapters, leaves), self.ROWS)
        wanted = [x, base, *(t for slot in (0, 3, 4, 6, 7) for t in leaves[slot])]
        dy = torch.randn(40, N).to(dtype)
        got = [y, *torch.autograd.grad(y, wanted, dy)]

        def formula(to):
            twins = [t.detach().to(to).requires_grad_() for t in wanted]
            y = twins[1].clone()
            for i, (rows, _, _, scaling) in enumerate(self.groups(adapters)):
                a, b = twins[2 + 2 * i : 4 + 2 * i]
                at = self.ROWS[rows]
                y = y.index_put((at,), scaling * twins[0][at] @ a.T @ b.T, accumulate=True)
            return [y, *torch.autograd.grad(y, twins, dy.to(to))]

        for i, (g, s, e) in enumerate(zip(got, formula(dtype), formula(torch.float64), strict=True)):
            assert_as_accurate(f"result {i}", g, s.to(g.dtype), e)

    def test_only_what_asks_gets_a_gradient(self):
        adapters = Adapters(K, N, torch.float32)
        b = adapters.ab[3][1].clone().requires_grad_()
        base, before = torch.randn(40, N), None
        before = base.clone()
        y = reference.lora_mixed(base, torch.randn(40, K), [(slice(0, 4), adapters.ab[3][0], b, 2.0)])
        y.sum().backward()
        assert b.grad is not None and torch.equal(base, before)


class TestGraphs:
    def compiled(self, fn, **options):
        graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        return torch.compile(fn, fullgraph=True, backend=graphs, **options), graphs

    @torch.no_grad()
    def test_one_graph_for_all_contents(self):
        adapters, embedding = Adapters(K, N, torch.float32), Adapters(V, D, torch.float32, index=1)
        x, w, bias = draw(37, torch.float32)
        base, ids = torch.randn(37, D), torch.randint(0, V, (37,))

        def model(slots):
            plan = functional.mixed_plan(slots, L, 2)
            y = functional.lora_linear_mixed(x, w, adapters.site, plan, bias)
            y = functional.lora_update_mixed(y, x, adapters.site, plan)
            return y, functional.lora_embedding_mixed(base, ids, embedding.site, plan, V)

        compiled, graphs = self.compiled(model)
        for slots in mixes(37, L).values():
            for got, expected in zip(compiled(slots), model(slots), strict=True):
                torch.testing.assert_close(got, expected)
        assert graphs.frame_count == 1

    @torch.no_grad()
    def test_dynamic_sizes(self):
        adapters, (_, w, bias) = Adapters(K, N, torch.float32), draw(1, torch.float32)

        def model(x, slots):
            return functional.lora_linear_mixed(x, w, adapters.site, functional.mixed_plan(slots, L, 1), bias)

        compiled, graphs = self.compiled(model, dynamic=True)
        for M in (37, 20, 130):
            x, slots = torch.randn(M, K), torch.arange(M) % L
            torch.testing.assert_close(compiled(x, slots), model(x, slots))
        assert graphs.frame_count == 1

    def test_opcheck(self):
        adapters, embedding = Adapters(K, N, torch.float32), Adapters(V, D, torch.float32)
        x, w, bias = draw(9, torch.float32)
        plan = plan_of(torch.arange(9) - 1)
        torch.library.opcheck(op.linear_mixed, (x, w, bias, *adapters.site, *plan, "torch"))
        torch.library.opcheck(op.linear_mixed, (x, w, None, *adapters.site, *plan, "auto"))
        torch.library.opcheck(op.update_mixed, (torch.randn(N, 9).T, x, *adapters.site, *plan, "torch"))
        ids = torch.randint(0, V, (9,))
        torch.library.opcheck(op.embedding_mixed, (torch.randn(9, D), ids, *embedding.site, *plan, V, "torch"))


class TestErrors:
    def call(self, message, error=ValueError, **changes):
        (x, w, bias), adapters = draw(5, torch.float32), Adapters(K, N, torch.float32)
        arguments = {"x": x, "w": w, "site": adapters.site, "plan": plan_of(torch.arange(5))}
        with pytest.raises(error, match=message):
            functional.lora_linear_mixed(**arguments | {"bias": bias} | changes)

    def test_shapes(self):
        self.call(r"must share K, got \(5, 71\) and \(50, 72\)", x=torch.randn(5, 71))
        self.call(r"bias must be \(50,\) in torch.float32, got \(1,\)", bias=torch.randn(1))
        self.call("the plan is for 4 rows, got 5", plan=plan_of(torch.arange(4)))
        adapters, plan = Adapters(K, N, torch.float32), plan_of(torch.arange(5))
        with pytest.raises(ValueError, match=r"base and x must share their leading sizes, got \(4, 50\) and \(5, 72\)"):
            functional.lora_update_mixed(torch.randn(4, N), torch.randn(5, K), adapters.site, plan)
        with pytest.raises(ValueError, match=r"base \(..., D\) and ids \(...\) disagree"):
            functional.lora_embedding_mixed(torch.randn(4, N), torch.arange(5), adapters.site, plan, V)

    def test_dtypes_and_devices(self):
        self.call("x and w must have one dtype", TypeError, x=torch.randn(5, K).half())
        self.call(
            "must be on the device of the rows, cpu, got cpu and meta", plan=plan_of(torch.arange(5, device="meta"))
        )

    def test_no_gradient(self):
        self.call("lora_linear_mixed has no gradient", RuntimeError, x=torch.randn(5, K, requires_grad=True))

    def test_implementations(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        self.call(r"must be one of \('auto', 'torch', 'grouped', .*got 'addmm'", implementation="addmm")
        self.call("'grouped' is a GPU kernel and x is on cpu: move x to a GPU", RuntimeError, implementation="grouped")
