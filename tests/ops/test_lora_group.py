"""lora_linear_group against fp64, outputs and every gradient, on the reference path (kernels: interpreter)."""

import pytest
import torch
from lora_inputs import make
from torch.nn import functional as F

from numerics import assert_as_accurate
from peft_fast.ops import functional, lora_group as op
from peft_fast.ops.functional import LoraSite

SIZES, RANKS, SCALINGS, BIASES = (48, 16, 33), (8, 5, 40), (2.0, 0.7, -1.1), (True, False, True)


def draw(M, K, dtype):
    x = torch.randn(M, K, dtype=dtype)
    made = [make(1, n, K, r, dtype, adapter_dtype=torch.float32)[1:] for n, r in zip(SIZES, RANKS, strict=True)]
    return x, [(w, a, b, bias if has else None) for (w, a, b, bias), has in zip(made, BIASES, strict=True)]


def group(x, sites):
    return functional.lora_linear_group(
        x, [LoraSite(w, a, b, scaling, bias) for (w, a, b, bias), scaling in zip(sites, SCALINGS, strict=True)]
    )


def plain(x, sites):
    return [
        F.linear(x, w, bias) + scaling * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        for (w, a, b, bias), scaling in zip(sites, SCALINGS, strict=True)
    ]


def results(fn, x, sites, dys):
    """Outputs, and the gradients of x and of each site's a, b and bias."""
    x = x.clone().requires_grad_()
    leaves = [[t if t is None else t.clone().requires_grad_() for t in site[1:]] for site in sites]
    ys = fn(x, [(site[0], *leaf) for site, leaf in zip(sites, leaves, strict=True)])
    flat = [x, *(t for leaf in leaves for t in leaf if t is not None)]
    return [y.detach() for y in ys] + list(torch.autograd.grad(ys, flat, dys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 37, 130])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
def test_forward_and_every_gradient(M, dtype, compiled):
    fn = torch.compile(group, fullgraph=True, backend="aot_eager") if compiled else group
    runs = ([], [], [])
    for _ in range(4):
        x, sites = draw(M, 70, dtype)
        dys = [torch.randn(M, n, dtype=dtype) for n in SIZES]
        doubles = [[None if t is None else t.double() for t in site] for site in sites]
        runs[0].append(results(fn, x, sites, dys))
        runs[1].append(results(plain, x, sites, dys))
        runs[2].append(results(plain, x.double(), doubles, [dy.double() for dy in dys]))
    for i in range(len(runs[0][0])):
        g, s, e = (torch.stack([run[i] for run in several]) for several in runs)
        assert g.dtype == s.dtype
        assert_as_accurate(f"result {i}", g, s, e)


def test_leading_sizes_no_gradients_and_gradients_of_a_part():
    x, sites = draw(12, 70, torch.float32)
    with torch.no_grad():
        for y, expected in zip(group(x.view(3, 4, 70), sites), plain(x, sites), strict=True):
            torch.testing.assert_close(y, expected.view(3, 4, -1))
    (_, a, *_), *_ = sites
    a.requires_grad_()
    first, *_ = group(x, sites)  # the other outputs get no gradient
    first.sum().backward()
    da = a.grad.clone()
    a.grad = None
    plain(x, sites)[0].sum().backward()
    torch.testing.assert_close(da, a.grad)


def test_opcheck():
    x, sites = draw(7, 20, torch.float32)
    ws, as_, bs, biases = map(list, zip(*sites, strict=True))
    torch.library.opcheck(op.group_fwd, (x, ws, biases, as_, bs, list(SCALINGS), "torch"))


def test_errors():
    x, [(w, a, b, bias), *_] = draw(7, 20, torch.float32)
    with pytest.raises(ValueError, match="at least one LoraSite"):
        functional.lora_linear_group(x, [])
    with pytest.raises(ValueError, match=r"b must be \(N, R\) = \(48, 8\), got \(8, 48\)"):
        functional.lora_linear_group(x, [LoraSite(w, a, b.T, 1.0, bias)])
    with pytest.raises(ValueError, match=r"w must be \(N, K\) in x's dtype and frozen"):
        functional.lora_linear_group(x, [LoraSite(w.double(), a, b, 1.0, bias)])
