"""The real kernels through the public functions and the ops: output and every gradient against fp64."""

import itertools

import pytest
import torch
from lora_inputs import gradients, keep_of, make, plain
from torch.nn import functional as F

from csrc_triton import tables
from csrc_triton.common import aot, tuning
from csrc_triton.lora import grad as lora_grad, linear as lora_linear, shrink as lora_shrink
from numerics import assert_as_accurate
from peft_fast.ops import functional, lora_linear as op
from peft_fast.ops.functional import LoraSite
from peft_fast.ops.operators import ONE_LAUNCH_MAX_RANK
from peft_fast.reference import lora as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # M, N, K, R
    (1, 64, 32, 8),
    (3, 1, 7, 1),
    (37, 50, 65, 5),
    (130, 96, 128, 16),
    (70, 33, 31, 40),
    (65, 40, 72, 64),
    (0, 16, 24, 4),
]
IDS = [f"M{m}-N{n}-K{k}-R{r}" for m, n, k, r in SHAPES]
SEED = torch.tensor([-(2**61) + 12345])


def seed_for(p):
    return SEED.to(DEVICE) if p else None


def check(fn, draw, p=0.0):
    """Compare fn(x, w, a, b, bias) with the formula, over several draws if values are few: torch may be lucky."""

    def formula(x, w, a, b, bias):
        keep = keep_of(x.reshape(-1, x.shape[-1]), p, SEED).view(x.shape)
        return plain(x, w, a, b, bias, 1.7, keep, p)

    got, same, exact = [], [], []
    x, _, a, b, _ = draw()
    for _ in range(1 + 24 // max(1, min(a.numel(), b.numel(), x.numel()))):
        tensors = draw()
        dy = torch.randn(*tensors[0].shape[:-1], tensors[1].shape[0], device=DEVICE, dtype=tensors[0].dtype)
        got.append(gradients(fn, tensors, dy))
        same.append(gradients(formula, tensors, dy))
        exact.append(gradients(formula, [t.double() for t in tensors], dy.double()))
    for i, name in enumerate(["y", "dx", "da", "db", "dbias"]):
        g, s, e = (torch.stack([run[i] for run in runs]) for runs in (got, same, exact))
        assert g.dtype == s.dtype, f"{name}: {g.dtype}, expected {s.dtype}"
        assert_as_accurate(name, g, s, e)


def drawn(*sizes_and_dtype, **options):
    """A draw of (x, w, a, b, bias)."""
    return lambda: make(*sizes_and_dtype, device=DEVICE, **options)


def linear(implementation, p=0.0):
    """fn(x, w, a, b, bias) for ``check``."""

    def fn(x, w, a, b, bias):
        options = dict(dropout_p=p, seed=seed_for(p), implementation=implementation)
        return functional.lora_linear(x, w, a, b, 1.7, bias, **options)

    return fn


def update(implementation, p=0.0):
    def fn(x, w, a, b, bias):
        options = dict(dropout_p=p, seed=seed_for(p), implementation=implementation)
        return functional.lora_update(F.linear(x, w, bias), x, a, b, 1.7, **options)

    return fn


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype, p", [*((dtype, 0.3) for dtype in DTYPES), (torch.bfloat16, 0.0)], ids=str)
@pytest.mark.parametrize("name", ["one_launch", "split"])
def test_forward_and_every_gradient(shape, dtype, p, name):
    check(linear(name, p), drawn(*shape, dtype), p)


@pytest.mark.parametrize("shape", SHAPES[2:5], ids=IDS[2:5])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("fn", [lambda p: linear("addmm", p), lambda p: update("split", p)], ids=["addmm", "update"])
def test_addmm_and_update(shape, p, fn):
    check(fn(p), drawn(*shape, torch.bfloat16), p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind, name", [(linear, "one_launch"), (linear, "split"), (linear, "addmm"), (update, "split")]
)
def test_fp32_adapters_on_half_activations(dtype, kind, name):
    check(kind(name), drawn(33, 48, 70, 8, dtype, adapter_dtype=torch.float32))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("fn", [linear, update], ids=["linear", "update"])
@pytest.mark.parametrize("name", ["one_launch", "split", "addmm"])
def test_strides(name, fn, p):
    """Conv1D's transposed weight, transposed adapters, x with gaps between elements, a dY that is not contiguous."""

    def draw():
        _, *matrices, bias = make(24, 40, 36, 8, torch.float32, device=DEVICE)
        x = torch.randn(2, 24, 72, device=DEVICE)[:, :, ::2]
        return x, *(t.T.contiguous().T for t in matrices), bias

    run = fn(name, p)
    check(lambda *tensors: run(*tensors).mT.contiguous().mT, draw, p)


@pytest.mark.parametrize("name", ["one_launch", "split"])
def test_gradient_with_zero_strides(name):
    """dY of y.sum() is one number seen everywhere."""
    x, w, a, b, bias = make(20, 24, 36, 8, torch.float32, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    got = torch.autograd.grad(linear(name)(x, w, a, b, bias).sum(), leaves)
    expected = torch.autograd.grad(plain(x, w, a, b, bias, 1.7, torch.ones_like(x), 0.0).sum(), leaves)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_without_bias():
    tensors = make(20, 24, 36, 8, torch.float32, device=DEVICE)
    for name in ("one_launch", "split"):
        y = functional.lora_linear(*tensors[:4], 1.7, None, implementation=name)
        zero = torch.zeros_like(tensors[4])
        torch.testing.assert_close(y, plain(*tensors[:4], zero, 1.7, torch.ones_like(tensors[0]), 0.0))


@pytest.mark.parametrize("M, N, K", [(0, 5, 6), (4, 0, 6), (4, 5, 0)])
@pytest.mark.parametrize("name", ["one_launch", "split", "addmm"])
def test_empty(M, N, K, name, launches):
    x, w, a, b, bias = make(M, N, max(K, 1), 3, torch.float32, device=DEVICE)
    x, w, a = x[:, :K], w[:, :K], a[:, :K]
    y, s, bits = op.linear_fwd(x, w, bias, a, b, 2.0, 0.5, seed_for(0.5), name)
    assert torch.equal(y, bias.expand(M, N)) or (K > 0 and N == 0)
    assert (s.shape, bits.shape) == ((M, 3), (M, (K + 7) // 8))
    launches.clear()
    dx, da, db = op.linear_bwd(torch.ones(M, N, device=DEVICE), x, w, a, b, s, bits, 2.0, 0.5, [True] * 3, name)
    assert not launches
    for gradient, of in ((dx, x), (da, a), (db, b)):
        assert torch.equal(gradient, torch.zeros_like(of))


class TestUpdate:
    def test_takes_the_dtype_of_the_base_and_leaves_it_alone(self):
        x, _, a, b, _ = make(20, 24, 36, 8, torch.bfloat16, device=DEVICE)
        base = torch.randn(20, 24, device=DEVICE)
        before = base.clone()
        y = functional.lora_update(base, x, a, b, 1.7, implementation="split")
        assert torch.equal(base, before) and y.dtype == torch.float32
        same = base + 1.7 * F.linear(F.linear(x, a), b)
        exact = base.double() + 1.7 * F.linear(F.linear(x.double(), a.double()), b.double())
        assert_as_accurate("y", y, same, exact)

    def test_base_that_is_not_contiguous(self):
        x, _, a, b, _ = make(20, 24, 36, 8, torch.float32, device=DEVICE)
        base = torch.randn(24, 20, device=DEVICE).T
        y = functional.lora_update(base, x, a, b, 1.7, implementation="split")
        torch.testing.assert_close(y, base + 1.7 * x @ a.T @ b.T)


class TestBackward:
    @pytest.mark.parametrize("with_w, p", [(True, 0.0), (True, 0.3), (False, 0.3)])
    @pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
    def test_every_combination_of_needs(self, needs, with_w, p, launches):
        x, w, a, b, _ = make(40, 24, 36, 8, torch.bfloat16, adapter_dtype=torch.float32, device=DEVICE)
        w = w if with_w else None
        dy = torch.randn(40, 24, device=DEVICE).bfloat16()
        _, s, bits = reference.lora_update_fwd(dy, x, a, b, 1.7, p, seed_for(p))
        got = op.linear_bwd(dy, x, w, a, b, s, bits, 1.7, p, list(needs), "split")
        forms = [
            ["lora_grad"] * (needs[1] + needs[2]),
            ["lora_shrink"] * (not needs[2] and any(needs)),
            ["lora_gemm" if with_w else "lora_expand"] * needs[0],
        ]
        assert sorted(launches) == sorted(itertools.chain(*forms)), "one pass over dY, one over x, one GEMM"
        same = reference.lora_linear_bwd(dy, x, w, a, b, s, bits, 1.7, p, [True] * 3)
        tensors = [None if t is None else t.double() for t in (dy, x, w, a, b, s)]
        exact = reference.lora_linear_bwd(*tensors, bits, 1.7, p, [True] * 3)
        for name, need, g, sm, e in zip(["dx", "da", "db"], needs, got, same, exact, strict=True):
            if need:
                assert g.dtype == sm.dtype
                assert_as_accurate(name, g, sm, e)
            else:
                assert g.shape == (0,)

    def test_parts_are_added_in_a_fixed_order(self, force, launches):
        """Rows, columns and ranks all in several parts; the same bits every time."""
        force("lora_grad", dict(BLOCK_M=16, BLOCK_C=64, LARGEST_R=16, ROWS=32))
        draw = drawn(130, 70, 72, 20, torch.float32)
        check(linear("split", 0.3), draw, 0.3)
        x, w, a, b, bias = draw()
        assert launches.count("sum_planes") == 3  # dB, dS and dA
        _, s, bits = op.linear_fwd(x, w, bias, a, b, 1.7, 0.3, seed_for(0.3), "split")
        dy = torch.randn(130, 70, device=DEVICE)
        runs = [op.linear_bwd(dy, x, w, a, b, s, bits, 1.7, 0.3, [True] * 3, "split") for _ in range(2)]
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)


class TestLaunches:
    def forward(self, name):
        x, w, a, b, bias = make(20, 24, 36, 8, torch.float32, device=DEVICE)
        return op.linear_fwd(x, w, bias, a, b, 1.7, 0.0, None, name)

    @pytest.mark.parametrize(
        "name, expected",
        [("one_launch", ["lora_one_launch"]), ("split", ["lora_shrink", "lora_gemm"]), ("addmm", ["lora_shrink"])],
    )
    def test_forward(self, name, expected, launches):
        self.forward(name)
        assert launches == expected

    def test_update(self, launches):
        x, w, a, b, _ = make(20, 24, 36, 8, torch.float32, device=DEVICE)
        op.update_fwd(F.linear(x, w), x, a, b, 1.7, 0.0, None, "split")
        assert launches == ["lora_shrink", "lora_expand"]

    def test_the_reference_launches_nothing(self, launches):
        self.forward("torch")
        assert launches == []


class TestSplitShrink:
    @pytest.mark.parametrize("p", [0.0, 0.3])
    def test_few_rows_share_the_work_over_K(self, p, launches):
        x, _, a, _, _ = make(3, 1, 1100, 5, torch.float32, device=DEVICE)
        s, bits = lora_shrink.lora_shrink(x, a, 0.5, p, seed_for(p))
        assert launches == ["lora_shrink", "sum_planes"]
        keep = keep_of(x, p, SEED)
        assert_as_accurate("s", s, 0.5 * (x * keep) @ a.T, 0.5 * (x.double() * keep.double()) @ a.double().T)
        assert torch.equal(s, lora_shrink.lora_shrink(x, a, 0.5, p, seed_for(p))[0])
        if p:
            assert torch.equal(bits.cpu(), reference.dropout_bits(SEED, 3, 1100, p))

    @pytest.mark.parametrize("p", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_product_adds_up_the_parts(self, p, dtype, launches):
        """Two launches for one token: no third one for s, which the product stores."""
        drawn = [make(3, 40, 1100, 5, dtype, adapter_dtype=torch.float32, device=DEVICE) for _ in range(4)]
        keep = keep_of(drawn[0][0], p, SEED)
        got, same, exact = [], [], []
        for x, w, a, b, bias in drawn:
            y, s, _ = op.linear_fwd(x, w, bias, a, b, 0.7, p, seed_for(p), "split")
            got.append((y, s))
            scale = 0.7 / (1 - p)
            for results, to in ((same, dtype), (exact, torch.float64)):
                x2, w2, a2, b2, bias2, keep2 = (t.to(to) for t in (x, w, a, b, bias, keep))
                s2 = scale * F.linear(x2 * keep2, a2)
                results.append((F.linear(x2, w2, bias2) + F.linear(s2, b2), s2))
        assert launches == ["lora_shrink", "lora_gemm"] * len(drawn)
        for name, g, s, e in zip(("y", "s"), *(zip(*runs, strict=True) for runs in (got, same, exact)), strict=True):
            assert_as_accurate(name, torch.stack(g), torch.stack(s), torch.stack(e))


class TestGroup:
    """Sites that read the same x."""

    def sites(self, ranks=(8, 5, 40), dtype=torch.bfloat16):
        x = torch.randn(37, 70, device=DEVICE).to(dtype)
        sizes = zip((48, 16, 33), ranks, strict=True)
        made = [make(1, n, 70, r, dtype, adapter_dtype=torch.float32, device=DEVICE) for n, r in sizes]
        _, ws, as_, bs, biases = map(list, zip(*made, strict=True))
        return x, ws, [biases[0], None, biases[2]], as_, bs

    @pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (2.0, 0.7, 1.1)], ids=["equal", "unequal"])
    def test_one_pass_over_x(self, scalings, launches):
        x, ws, biases, as_, bs = self.sites()
        *ys, s = lora_linear.lora_linear_group_fwd(x, ws, biases, as_, bs, list(scalings), "split")
        results = zip(ys, s.split([a.shape[0] for a in as_], dim=1), strict=True)
        assert launches.count("lora_shrink") == 1 and launches.count("lora_gemm") == 3
        for w, bias, a, b, scaling, (y, s) in zip(ws, biases, as_, bs, scalings, results, strict=True):
            same = F.linear(x, w, bias) + scaling * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            xd, wd, ad, bd = x.double(), w.double(), a.double(), b.double()
            exact_s = scaling * xd @ ad.T
            exact = F.linear(xd, wd, None if bias is None else bias.double()) + exact_s @ bd.T
            assert_as_accurate("y", y, same, exact)
            assert_as_accurate("s", s, scaling * F.linear(x, a.to(x.dtype)), exact_s)

    def test_ranks_beyond_one_block(self):
        x, ws, biases, as_, bs = self.sites(ranks=(100, 64, 50), dtype=torch.float32)
        s = lora_linear.lora_linear_group_fwd(x, ws, biases, as_, bs, [1.0] * 3, "split")[-1]
        torch.testing.assert_close(s, x @ torch.cat(as_).T)

    @pytest.mark.parametrize("name", ["split", "one_launch"])
    def test_public_function_and_every_gradient(self, name):
        x, ws, biases, as_, bs = self.sites(dtype=torch.float32)

        def run(fn, x, as_, bs):
            leaves = [t.detach().clone().requires_grad_() for t in (x, *as_, *bs)]
            ys = fn(leaves[0], leaves[1:4], leaves[4:])
            return [*ys, *torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])]

        def ours(x, as_, bs):
            sites = [LoraSite(*site) for site in zip(ws, as_, bs, (2.0, 0.7, 1.1), biases, strict=True)]
            return functional.lora_linear_group(x, sites, implementation=name)

        def plain(x, as_, bs):
            sites = zip(ws, biases, as_, bs, (2.0, 0.7, 1.1), strict=True)
            return [
                F.linear(x, w.to(x), None if bias is None else bias.to(x)) + scaling * x @ a.T @ b.T
                for w, bias, a, b, scaling in sites
            ]

        got, same = run(ours, x, as_, bs), run(plain, x, as_, bs)
        exact = run(plain, x.double(), [a.double() for a in as_], [b.double() for b in bs])
        for i, (g, s, e) in enumerate(zip(got, same, exact, strict=True)):
            assert_as_accurate(f"result {i}", g, s, e)


class TestLayouts:
    """What a GPU would read wrongly without an error."""

    @pytest.mark.parametrize("name", ["split", "one_launch"])
    def test_a_bias_that_is_a_column(self, name):
        x, w, a, b, _ = make(17, 48, 40, 8, torch.float32, device=DEVICE)
        for bias in (torch.randn(48, 3, device=DEVICE)[:, 1], torch.randn(1, device=DEVICE).expand(48)):
            y = functional.lora_linear(x, w, a, b, 2.0, bias, implementation=name)
            torch.testing.assert_close(y, F.linear(x, w, bias) + 2.0 * x @ a.T @ b.T)

    def test_rows_further_apart_than_int32_counts(self):
        """x = hidden[:, -1] of a long context: BLOCK_M rows are more than 2^31 elements."""
        M, K, R, stride = 80, 24, 3, 2**25 + 16
        x = torch.empty((M - 1) * stride + K, dtype=torch.float16, device=DEVICE).as_strided((M, K), (stride, 1))
        x.copy_(torch.randn(M, K))
        ds = torch.randn(M, R, dtype=torch.float16, device=DEVICE)
        da = lora_grad.lora_da(x, ds, None, torch.float32)
        torch.testing.assert_close(da, ds.float().T @ x.float(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("R, passes", [(16, ["lora_grad"]), (64, ["lora_grad", "lora_shrink"])])
    def test_two_passes_over_dy_where_the_planes_are_larger(self, R, passes, launches):
        dy, s, b = (torch.randn(*size, device=DEVICE) for size in ((40, 70), (40, R), (70, R)))
        db, ds = lora_grad.lora_db_ds(dy, s, b, 0.5, torch.float32)
        assert [name for name in launches if name != "sum_planes"] == passes
        torch.testing.assert_close(db, dy.T @ s)
        torch.testing.assert_close(ds, 0.5 * dy @ b)


class TestBits:
    @pytest.mark.parametrize("p", [1e-6, 0.3])
    @pytest.mark.parametrize("M, K", [(1, 1), (3, 7), (17, 8), (70, 150)])
    @pytest.mark.parametrize("name", ["one_launch", "split"])
    def test_are_the_references(self, M, K, p, name):
        x, w, a, b, bias = make(M, 5, K, 3, torch.float32, device=DEVICE)
        _, _, bits = op.linear_fwd(x, w, bias, a, b, 1.0, p, seed_for(p), name)
        assert torch.equal(bits.cpu(), reference.dropout_bits(SEED, M, K, p))

    def test_a_new_seed_in_the_same_tensor_draws_a_new_mask(self):
        """As a replayed graph sees it."""
        x, _, a, _, _ = make(17, 5, 40, 3, torch.float32, device=DEVICE)
        seed = torch.tensor([3], device=DEVICE)
        first = lora_shrink.lora_shrink(x, a, 1.0, 0.5, seed)[1]
        seed.add_(1 << 40)
        second = lora_shrink.lora_shrink(x, a, 1.0, 0.5, seed)[1]
        assert not torch.equal(first, second)
        assert torch.equal(second.cpu(), reference.dropout_bits(seed.cpu(), 17, 40, 0.5))


CANDIDATES = [(kernel, c) for kernel, rows in sorted(tuning.CANDIDATES.items()) for c in rows]


class TestCandidates:
    """Every configuration that tuning may choose, on sizes that need several tiles in each direction and fill none."""

    @pytest.mark.parametrize("kernel, candidate", CANDIDATES, ids=[f"{kernel}-{c.label}" for kernel, c in CANDIDATES])
    def test_right(self, kernel, candidate, force):
        force(kernel, candidate.config)
        dtype = torch.float32 if candidate.itemsize == 4 else torch.bfloat16
        draw = drawn(candidate.blocks["BLOCK_M"] + 3, 145, 150, 20, dtype, adapter_dtype=torch.float32)
        fn = {"lora_one_launch": linear("one_launch", 0.3), "lora_expand": update("split", 0.3)}
        check(fn.get(kernel, linear("split", 0.3)), draw, 0.3)

    @pytest.mark.parametrize("kernel", ["lora_shrink", "lora_one_launch"])
    def test_the_mask_does_not_depend_on_the_configuration(self, kernel, force):
        x, w, a, b, bias = make(70, 20, 150, 8, torch.float32, device=DEVICE)
        expected = reference.dropout_bits(SEED, 70, 150, 0.3)
        name = "one_launch" if kernel == "lora_one_launch" else "split"
        for candidate in tuning.CANDIDATES[kernel]:
            force(kernel, candidate.config)
            bits = op.linear_fwd(x, w, bias, a, b, 1.0, 0.3, seed_for(0.3), name)[2]
            assert torch.equal(bits.cpu(), expected), candidate.label

    def test_the_order_of_tiles_changes_no_bit(self, force):
        x, w, a, b, bias = make(70, 130, 150, 8, torch.bfloat16, device=DEVICE)
        results = []
        for group in (1, 2, 3, 8):
            force("lora_gemm", dict(BLOCK_M=16, BLOCK_N=32, GROUP_M=group))
            results.append(op.linear_fwd(x, w, bias, a, b, 1.0, 0.0, None, "split")[0])
        assert all(torch.equal(results[0], other) for other in results)

    def test_every_kernel_has_a_default_everywhere(self):
        aot.kernel_modules()
        # those of prefix attention are chosen by the head's size, and have a test of their own in test_prefix.py;
        # fourbit_decode has one configuration, for 16 bits on NVIDIA's GPUs, and is asked for where `decodes` says so
        kernels = [k for k in tuning.CANDIDATES if not k.startswith("prefix_") and k != "fourbit_decode"]
        for arch, itemsize, kernel in itertools.product(tuning.ARCHS, (2, 4), kernels):
            offered = list(tuning.candidates_for(kernel, arch, itemsize))
            for M, R in itertools.product((1, 64, 1 << 20), (16, ONE_LAUNCH_MAX_RANK)):
                assert any(M <= c.default_to and R <= c.max_rank for c in offered), (kernel, arch, itemsize, M, R)

    def test_a_measured_row_is_taken(self, monkeypatch):
        first, second, *_ = [c.config for c in tuning.candidates_for("lora_gemm", "sm_90") if not c.default_to]
        row = {"kernel": "lora_gemm", "gpu": "Test GPU", "arch": "sm_90", "gain": 2.0,
               "dtype": "bfloat16", "M": 64, "N": 32, "K": 48, "R": 16, "config": first}  # fmt: skip
        rows = [row, row | {"M": 256, "config": second}, row | {"M": 512, "config": {"BLOCK_M": 1}}]
        monkeypatch.setattr(tables, "read", lambda path: rows if path.parent == tables.SHIPPED else ())
        monkeypatch.setattr(tables, "gpu_of", lambda device: tables.Gpu("sm_90", "Test GPU"))
        monkeypatch.setattr(tuning, "arch_of", lambda device: "sm_90")
        tuning._lookup.cache_clear()
        gpu, bf16 = torch.device("cuda", 0), torch.bfloat16
        looked_up = [tuning._lookup("lora_gemm", gpu, bf16, M, 32, 48, 16) for M in (1, 64, 65, 256)]
        assert looked_up == [first, first, second, second]
        for other in [(512, 32, 48, 16), (1024, 32, 48, 16), (64, 65, 48, 16), (64, 32, 97, 16), (64, 32, 48, 64)]:
            config = tuning._lookup("lora_gemm", gpu, bf16, *other)
            assert config == tuning.default_config("lora_gemm", "sm_90", bf16, other[0], other[3]), "no candidate now"
        tuning._lookup.cache_clear()
