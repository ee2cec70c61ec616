"""lora_linear and lora_update against fp64, output and every gradient, on the reference path (kernels: interpreter)."""

import time

import pytest
import torch
from lora_inputs import gradients, keep_of, make, plain
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from numerics import assert_as_accurate
from peft_fast.ops import functional, lora_linear as op
from peft_fast.reference import cpu, dropout as reference_dropout, lora as reference, mixed as reference_mixed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # M, N, K, R
    (1, 64, 32, 8),
    (3, 1, 7, 1),
    (37, 50, 65, 5),
    (130, 96, 128, 16),
    (200, 33, 31, 40),
    (0, 16, 24, 4),
]
IDS = [f"M{m}-N{n}-K{k}-R{r}" for m, n, k, r in SHAPES]


def check(fn, draw, scaling, p=0.0, seed=None):
    """Compare fn with the formula over several draws together: with one output value, plain torch may be lucky."""

    def formula(x, w, a, b, bias):
        keep = keep_of(x.reshape(-1, x.shape[-1]), p, seed).view(x.shape)
        return plain(x, w, a, b, bias, scaling, keep, p)

    got, same, exact = [], [], []
    for _ in range(8):
        tensors = draw()
        x = tensors[0]
        dy = torch.randn(*x.shape[:-1], tensors[1].shape[0], device=x.device, dtype=x.dtype)
        got.append(gradients(fn, tensors, dy))
        same.append(gradients(formula, tensors, dy))
        exact.append(gradients(formula, [t.double() for t in tensors], dy.double()))
    for i, name in enumerate(["y", "dx", "da", "db", "dbias"]):
        g, s, e = (torch.stack([run[i] for run in runs]) for runs in (got, same, exact))
        assert g.dtype == s.dtype, f"{name}: {g.dtype}, expected {s.dtype}"
        assert_as_accurate(name, g, s, e)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("fused", [True, False], ids=["linear", "update"])
def test_forward_and_every_gradient(shape, dtype, p, fused, device):
    seed = functional.new_seed(device) if p else None

    def fn(x, w, a, b, bias):
        if fused:
            return functional.lora_linear(x, w, a, b, 1.7, bias, dropout_p=p, seed=seed)
        return functional.lora_update(F.linear(x, w, bias), x, a, b, 1.7, dropout_p=p, seed=seed)

    check(fn, lambda: make(*shape, dtype, device=device), 1.7, p, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [0, 1, 64, 65])
@pytest.mark.parametrize("fused", [True, False], ids=["linear", "update"])
def test_inference_without_gradients(dtype, M, fused):
    """Without gradients plain torch is called directly: the same values."""

    def fn(x, w, a, b, bias):
        if fused:
            return functional.lora_linear(x, w, a, b, 1.7, bias)
        return functional.lora_update(F.linear(x, w, bias), x, a, b, 1.7)

    drawn = [make(M, 48, 64, 8, dtype, adapter_dtype=torch.float32) for _ in range(8)]
    drawn = [(x.view(1, M, 64)[:, :, :], *rest) for x, *rest in drawn]
    with torch.no_grad():
        got = torch.stack([fn(*tensors) for tensors in drawn])
        same = torch.stack([plain(*tensors, 1.7, 1.0, 0.0) for tensors in drawn])
        exact = torch.stack([plain(*(t.double() for t in tensors), 1.7, 1.0, 0.0) for tensors in drawn])
    assert got.dtype == dtype
    assert_as_accurate("y", got, same, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [2, 200])
def test_fp32_adapters_on_half_activations(dtype, M):
    check(
        lambda x, w, a, b, bias: functional.lora_linear(x, w, a, b, 0.5, bias),
        lambda: make(M, 48, 64, 8, dtype, adapter_dtype=torch.float32),
        0.5,
    )


class Products(TorchDispatchMode):
    """The dtypes of the matrix products that are made inside."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes.append(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
class TestACpuThatIsSlowAt16Bits:
    """Only the base's products stay in 16 bits there, however many rows there are: forward, backward, inference."""

    @pytest.fixture(autouse=True)
    def slow(self, monkeypatch):
        for module in (reference, reference_mixed):
            monkeypatch.setattr(module, "slow_on_cpu", lambda dtype: dtype.itemsize == 2)

    def linear(self, p):
        seed = torch.tensor([5]) if p else None
        return lambda x, w, a, b, bias: functional.lora_linear(x, w, a, b, 0.7, bias, dropout_p=p, seed=seed)

    def test_values(self, dtype, p):
        check(self.linear(p), lambda: make(130, 48, 64, 8, dtype), 0.7, p, torch.tensor([5]))
        check(self.linear(p), lambda: make(130, 48, 64, 8, dtype, torch.float32), 0.7, p, torch.tensor([5]))

    def test_products(self, dtype, p):
        x, w, a, b, bias = make(130, 48, 64, 8, dtype)
        seed = torch.tensor([5]) if p else None
        with Products() as made:
            y, s, bits = reference.lora_linear_fwd(x, w, bias, a, b, 0.7, p, seed)
            reference.lora_linear_bwd(y, x, w, a, b, s, bits, 0.7, p, [True] * 3)
        assert (made.dtypes.count(dtype), made.dtypes.count(torch.float32)) == (2, 6)
        with torch.no_grad(), Products() as made:
            functional.lora_linear(x, w, a, b, 0.7, bias)
        assert (made.dtypes.count(dtype), made.dtypes.count(torch.float32)) == (1, 2)

    def test_rows_of_several_adapters(self, dtype, p):
        x, w, a, b, _ = make(130, 48, 64, 8, dtype)
        groups = [(slice(0, 100), a, b, 0.7), (slice(100, 130), a, b, 0.2)]
        with torch.no_grad(), Products() as made:
            y = reference_mixed.lora_mixed(F.linear(x, w), x, groups)
        assert made.dtypes.count(dtype) == 1 and y.dtype == dtype


@pytest.mark.parametrize("seconds", [0.4, 8.0])
def test_a_graph_knows_what_the_cpu_is_fast_at(seconds, monkeypatch):
    """Also where the first call of all is the compiler's, which cannot trace a clock."""

    def measured(dtype):
        return time.perf_counter() * 0 + (seconds if dtype.itemsize == 2 else 1.0)

    graphs = []
    monkeypatch.setattr(cpu, "_seconds", measured)
    cpu._is_slow.cache_clear()
    torch.compiler.reset()
    x, w, a, b, bias = make(130, 48, 64, 8, torch.bfloat16)
    try:
        with torch.no_grad():
            linear = torch.compile(
                functional.lora_linear,
                fullgraph=True,
                backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
            )
            assert torch.equal(linear(x, w, a, b, 0.7, bias), functional.lora_linear(x, w, a, b, 0.7, bias))
    finally:
        cpu._is_slow.cache_clear()
    assert (".float()" in graphs[0].code) == (seconds > 1)


def test_what_a_cpu_is_fast_at_is_measured_once(monkeypatch):
    seconds = {torch.float32: 1.0, torch.bfloat16: 8.0, torch.float16: 2.0}
    monkeypatch.setattr(cpu, "_seconds", lambda dtype: seconds[dtype])
    cpu._is_slow.cache_clear()
    try:
        assert [cpu.slow_on_cpu(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [
            True,
            False,
            False,
        ]
        assert "bf16 in fp32, of fp16 natively" in cpu.describe()
        seconds[torch.bfloat16] = 0.4
        assert cpu.slow_on_cpu(torch.bfloat16)
    finally:
        cpu._is_slow.cache_clear()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
def test_strided_inputs(compiled):
    """A transposed weight (Conv1D), a sliced x and leading dimensions, eager and in one graph."""

    def draw():
        _, w, a, b, bias = make(24, 40, 36, 8, torch.float32)
        return torch.randn(2, 24, 72)[:, :, ::2], w.T.contiguous().T, a, b, bias

    fn = functional.lora_linear
    if compiled:
        fn = torch.compile(fn, fullgraph=True, backend="aot_eager")
    check(lambda x, w, a, b, bias: fn(x, w, a, b, 2.0, bias), draw, 2.0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph_with_dropout(dynamic):
    seed = functional.new_seed("cpu")
    compiled = torch.compile(functional.lora_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)

    def fn(x, w, a, b, bias):
        return compiled(x, w, a, b, 2.0, bias, dropout_p=0.2, seed=seed)

    check(fn, lambda: make(70, 40, 36, 8, torch.float32), 2.0, 0.2, seed)


def test_opcheck():
    x, w, a, b, bias = make(70, 6, 9, 3, torch.float32)
    seed = functional.new_seed("cpu")
    _, s, bits = op.linear_fwd(x, w, bias, a, b, 2.0, 0.5, seed, "torch")
    torch.library.opcheck(op.linear_fwd, (x, w, bias, a, b, 2.0, 0.5, seed, "torch"))
    torch.library.opcheck(op.linear_fwd, (x, w, None, a, b, 2.0, 0.0, None, "torch"))
    torch.library.opcheck(op.update_fwd, (x @ w.T, x, a, b, 2.0, 0.5, seed, "torch"))
    dy = torch.randn(70, 6)
    for needs in ([True, True, True], [True, False, False], [False, False, True]):
        torch.library.opcheck(op.linear_bwd, (dy, x, w, a, b, s, bits, 2.0, 0.5, needs, "torch"))


def test_only_the_gradients_asked_for(monkeypatch):
    x, w, a, b, bias = make(5, 6, 9, 3, torch.float32)
    asked = []
    real = op.linear_bwd
    monkeypatch.setattr(op, "linear_bwd", lambda *args: asked.append(args[-2]) or real(*args))
    b.requires_grad_()
    functional.lora_linear(x, w, a, b, 2.0, bias).sum().backward()
    assert asked == [[False, False, True]]
    assert b.grad is not None and a.grad is None


def test_update_leaves_the_base_alone_and_takes_its_dtype():
    x, _, a, b, _ = make(5, 6, 9, 3, torch.bfloat16)
    base = torch.randn(5, 6)
    before = base.clone()
    y = functional.lora_update(base, x, a, b, 2.0)
    assert torch.equal(base, before) and y.dtype == torch.float32
    assert not torch.equal(y, base)


def test_autocast_takes_part_in_its_dtype():
    x, w, a, b, bias = make(100, 16, 32, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.lora_linear(x, w, a, b, 2.0, bias)
        expected = functional.lora_linear(x.bfloat16(), w.bfloat16(), a, b, 2.0, bias.bfloat16())
        assert functional.lora_update(F.linear(x, w), x, a, b, 2.0).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("fused", [True, False], ids=["linear", "update"])
def test_backward_under_an_autocast_that_the_forward_did_not_see(p, fused):
    """An fp32 island inside autocast, and loss.backward() inside it too: plain torch and PEFT work there."""
    x, w, a, b, bias = make(100, 16, 32, 4, torch.float32)
    seed, results = functional.new_seed("cpu"), []
    for outer in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            with torch.autocast("cpu", enabled=False):
                options = {"dropout_p": p, "seed": seed if p else None}
                if fused:
                    y = functional.lora_linear(leaves[0], w, *leaves[1:], 2.0, bias, **options)
                else:
                    y = functional.lora_update(F.linear(leaves[0], w, bias), *leaves, 2.0, **options)
            y.square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    if fused:  # the base's own product is torch's, and autocast reaches it
        assert all(torch.equal(inside, outside) for outside, inside in zip(*results, strict=True))
    else:
        assert all(
            torch.equal(inside, outside) for outside, inside in zip(*results, strict=True) if inside.shape != x.shape
        )


def test_update_of_a_transposed_base():
    """The result is contiguous whatever the base's layout, as a compiled graph expects."""
    x, _, a, b, _ = make(7, 6, 9, 3, torch.float32)
    base = torch.randn(6, 7).T
    torch.library.opcheck(op.update_fwd, (base, x, a, b, 2.0, 0.0, None, "torch"))
    with torch.no_grad():
        assert functional.lora_update(base, x, a, b, 2.0).is_contiguous()
    torch.testing.assert_close(functional.lora_update(base, x, a, b, 2.0), base + 2 * x @ a.T @ b.T)


def test_an_fp64_base_is_not_for_the_kernels(monkeypatch):
    """They add in fp32."""
    seen = []
    real = op.choose
    monkeypatch.setattr(
        op,
        "choose",
        lambda name, device, dtype, *args, **kw: seen.append(dtype) or real(name, device, dtype, *args, **kw),
    )
    x, _, a, b, _ = make(70, 6, 9, 3, torch.bfloat16)
    base = 1 + 1e-12 * torch.randn(70, 6, dtype=torch.float64)
    y = functional.lora_update(base, x, a.requires_grad_(), b * 0, 2.0)
    assert seen == [torch.float64] and torch.equal(y, base)


def test_pefts_own_arithmetic():
    """The switch: fp32 adapters pull bf16 activations into fp32, bit for bit as PEFT does."""
    x, w, a, b, bias = make(9, 16, 32, 4, torch.bfloat16, adapter_dtype=torch.float32)
    y = functional.lora_linear(x, w, a, b, 2.0, bias, implementation="peft")
    expected = (F.linear(x, w, bias) + F.linear(F.linear(x.float(), a), b) * 2.0).to(torch.bfloat16)
    assert torch.equal(y, expected)
    assert torch.equal(functional.lora_update(F.linear(x, w, bias), x, a, b, 2.0, implementation="peft"), expected)


def keep_by_hand(seed, m, k, p):
    """The definition of one bit in Python integers, written apart from the library."""

    def mix(h):
        h = ((h ^ (h >> 16)) * 0x7FEB352D) % 2**32
        h = ((h ^ (h >> 15)) * 0x846CA68B) % 2**32
        return h ^ (h >> 16)

    low, high = seed % 2**32, (seed >> 32) % 2**32
    word = mix(mix((m + low) % 2**32) ^ high) ^ mix(mix((k // 2 + 0x9E3779B9 + high) % 2**32) ^ low)
    word = (word * 0x7FEB352D) % 2**32
    word = ((word ^ (word >> 15)) * 0x846CA68B) % 2**32
    word ^= word >> 16
    lane = (word >> (16 * (k % 2))) % 2**16
    return (lane ^ 0x8000) >= round(p * 2**16)


def test_difference_from_pefts_fp32_branch_is_as_documented():
    """docs/numerics.md: 2.9e-3 of the gradients of A and B."""
    x, w, a, b, _ = make(1024, 512, 512, 16, torch.bfloat16, adapter_dtype=torch.float32)
    dy = torch.randn(1024, 512).bfloat16()
    gradients_of = []
    for implementation in ("torch", "peft"):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        functional.lora_linear(x, w, *leaves, 2.0, implementation=implementation).backward(dy)
        gradients_of.append([leaf.grad for leaf in leaves])
    for ours, pefts in zip(*gradients_of, strict=True):
        assert 2e-3 < (ours - pefts).norm() / pefts.norm() < 4e-3


class TestDropoutBits:
    @pytest.mark.parametrize("seed", [0, 5, 2**62 + 11, -7, 5 + 2**32])
    def test_is_the_documented_hash(self, seed):
        M, K, p = 9, 21, 0.4
        keep = keep_of(torch.empty(M, K), p, torch.tensor([seed]))
        assert keep.bool().tolist() == [[keep_by_hand(seed, m, k, p) for k in range(K)] for m in range(M)]

    def test_same_seed_same_mask_and_rows_do_not_depend_on_the_size(self):
        seed = torch.tensor([-(2**61) + 12345])
        bits = reference.dropout_bits(seed, 300, 70, 0.3)
        assert torch.equal(bits, reference.dropout_bits(seed, 300, 70, 0.3))
        assert torch.equal(bits[:17], reference.dropout_bits(seed, 17, 70, 0.3))
        assert not torch.equal(bits, reference.dropout_bits(seed + 1, 300, 70, 0.3))

    def test_independent_of_the_piece_size(self, monkeypatch):
        seed = torch.tensor([7])
        bits = reference.dropout_bits(seed, 50, 33, 0.5)
        monkeypatch.setattr(reference_dropout, "_MASK_PIECE", 40)
        assert torch.equal(bits, reference.dropout_bits(seed, 50, 33, 0.5))

    @pytest.mark.parametrize("seed", [0, 7, 2**62 + 11, -(2**61) + 12345, -1])
    @pytest.mark.parametrize("M, K", [(1, 1), (50, 33), (9, 70), (0, 8)])
    def test_the_mask_drawn_on_a_gpu_is_the_same(self, M, K, seed, monkeypatch):
        seed = torch.tensor([seed])
        monkeypatch.setattr(reference_dropout, "_WIDE_PIECE", 100)
        assert torch.equal(reference_dropout.by_torch(seed, M, K, 0.3), reference.dropout_bits(seed, M, K, 0.3))

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
    def test_statistics(self, p):
        """Rate over all, per row and per column, and no correlation along rows, columns, or between a word's lanes,
        within five standard deviations of independent draws, and no two rows more alike than in torch's own draws."""
        M, K = 2000, 1024

        def standardized(keep):
            return (keep.double() - (1 - p)) / (p * (1 - p)) ** 0.5

        z = standardized(keep_of(torch.empty(M, K), p, torch.randint(0, 2**62, (1,))))
        torchs = standardized(torch.empty(M, K).bernoulli_(1 - p))
        assert abs(z.mean()) < 5 / (M * K) ** 0.5
        assert z.mean(0).abs().max() < 5.5 / M**0.5
        assert z.mean(1).abs().max() < 5.5 / K**0.5
        for shift in (1, 2, 7, 512):
            assert abs((z[:, shift:] * z[:, :-shift]).mean()) < 5 / (M * (K - shift)) ** 0.5
        for shift in (1, 2, 64, 1000):
            assert abs((z[shift:] * z[:-shift]).mean()) < 5 / ((M - shift) * K) ** 0.5
        ours, theirs = ((t @ t.T).fill_diagonal_(0).abs().max() for t in (z, torchs))
        assert ours < 1.3 * theirs

    def test_seeds_are_repeatable_and_restored_by_the_generator(self):
        torch.manual_seed(3)
        first, second = functional.new_seed("cpu"), functional.new_seed("cpu")
        torch.manual_seed(3)
        assert torch.equal(first, functional.new_seed("cpu")) and not torch.equal(first, second)


class TestErrors:
    def tensors(self):
        return make(5, 6, 9, 3, torch.float32)

    def call(self, message, error=ValueError, **changes):
        x, w, a, b, bias = self.tensors()
        arguments = {"x": x, "w": w, "a": a, "b": b, "scaling": 1.0, "bias": bias} | changes
        with pytest.raises(error, match=message):
            functional.lora_linear(**arguments)

    def test_shapes(self):
        self.call(r"x \(\.\.\., K\) and a \(R, K\) must share K, got \(5, 9\) and \(3, 8\)", a=torch.randn(3, 8))
        self.call(r"b must be \(N, R\) = \(6, 3\), got \(6, 4\)", b=torch.randn(6, 4))
        self.call(r"x \(\.\.\., K\) and w \(N, K\) must share K, got \(5, 9\) and \(6, 8\)", w=torch.randn(6, 8))
        with pytest.raises(ValueError, match="must share their leading sizes"):
            functional.lora_update(torch.randn(4, 6), torch.randn(5, 9), torch.randn(3, 9), torch.randn(6, 3), 1.0)

    def test_bias(self):
        self.call(r"bias must be \(6,\) in torch.float32, got \(1,\) in torch.float32", bias=torch.randn(1))
        self.call(r"bias must be \(6,\) in torch.float32, got \(6,\) in torch.float16", bias=torch.randn(6).half())

    def test_devices(self):
        self.call("a, b and seed must be on x's device cpu, got meta, cpu", a=torch.randn(3, 9, device="meta"))
        self.call(
            "a, b and seed must be on x's device cpu",
            dropout_p=0.5,
            seed=torch.ones(1, dtype=torch.int64, device="meta"),
        )
        self.call("w and bias must be on x's device cpu", w=torch.randn(6, 9, device="meta"))

    def test_dtypes(self):
        self.call("must be fp16, bf16, fp32 or fp64", TypeError, a=torch.ones(3, 9, dtype=torch.int32))
        self.call("x and w must have one dtype", TypeError, w=torch.randn(6, 9, dtype=torch.float16))

    def test_values(self):
        self.call("w requires grad", w=torch.randn(6, 9, requires_grad=True))
        self.call(r"dropout_p must be in \[0, 1\), got 1.0", dropout_p=1.0)
        self.call("needs seed", dropout_p=0.5)
        self.call("implementation", implementation="fastest")


def test_no_activation_sized_tensor_but_x_is_saved():
    """The graph keeps x itself, s and one bit per element: no dropout(x), no byte mask."""
    x, w, a, b, bias = make(256, 48, 64, 8, torch.float32)
    a.requires_grad_(), b.requires_grad_(), x.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.lora_linear(x, w, a, b, 2.0, bias, dropout_p=0.5, seed=functional.new_seed("cpu"))
    new = [t for t in saved if not any(t.data_ptr() == known.data_ptr() for known in (x, w, a, b, bias))]
    assert sorted(t.numel() * t.element_size() for t in new) == [256 * 64 // 8, 256 * 8 * 4]


@pytest.mark.parametrize("change", [{"a": (3, 8)}, {"b": (6, 4)}, {"b": (1, 3)}, {"w": (6, 8)}, {"w": (5, 9)}], ids=str)
def test_errors_are_the_same_without_gradients(change):
    """Without gradients the checks come after torch's own refusal."""
    tensors = dict(zip("xwab", make(5, 6, 9, 3, torch.bfloat16), strict=False))
    tensors |= {name: torch.randn(shape).to(torch.bfloat16) for name, shape in change.items()}
    with pytest.raises(ValueError) as with_gradients:
        functional.lora_linear(*tensors.values(), 1.0)
    with torch.no_grad(), pytest.raises(ValueError) as without:
        functional.lora_linear(*tensors.values(), 1.0)
    assert str(without.value) == str(with_gradients.value)


# ---------------------------------------------------------------------------------------------------- the range of fp16
RANGES = [(300.0, 1.0), (3000.0, 0.1), (1.0, 1e-4), (1.0, 1e-6), (100.0, 1e-5)]


@pytest.mark.parametrize("op", ["linear", "update"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("size_of_x", "size_of_b"), RANGES)
@pytest.mark.parametrize("rows", [16, 130])
def test_fp16_with_fp32_adapters_stays_in_range(
    rows: int, size_of_x: float, size_of_b: float, p: float, op: str
) -> None:
    """x @ a.T overflows for large activations, dy @ b vanishes for a small B; PEFT makes these products in fp32."""
    torch.manual_seed(0)
    K, N, R = 1024, 512, 8
    x, w = (size_of_x * torch.randn(rows, K)).half(), (torch.randn(N, K) * K**-0.5 / size_of_x).half()
    a, b = torch.randn(R, K) * K**-0.5, size_of_b * torch.randn(N, R)
    dy, seed = torch.randn(rows, N).half(), torch.tensor([5])
    found = []
    for dtype in (torch.float16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x2, a2, b2 = (t.detach().clone().to(d).requires_grad_() for t, d in ((x, dtype), (a, wide), (b, wide)))
        more = dict(dropout_p=p, seed=seed if p else None)
        if op == "linear":
            y = functional.lora_linear(x2, w.to(dtype), a2, b2, 2.0, **more)
        else:
            y = functional.lora_update(F.linear(x2, w.to(dtype)), x2, a2, b2, 2.0, **more)
        y.backward(dy.to(dtype))
        found.append((y.detach(), x2.grad, a2.grad, b2.grad))
    for ours, exact in zip(*found, strict=True):
        within = exact.abs() < 6e4
        assert ours.isfinite().logical_or(~within).all()
        cosine = F.cosine_similarity(ours[within].double(), exact[within], dim=0)
        assert cosine > 0.999, cosine
    with torch.no_grad():
        y = functional.lora_linear(x, w, a, b, 2.0)
        exact = functional.lora_linear(x.double(), w.double(), a.double(), b.double(), 2.0)
    assert y.isfinite().logical_or(exact.abs() > 6e4).all()
