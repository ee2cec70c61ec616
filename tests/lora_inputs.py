"""Inputs, formula and gradients of a layer with LoRA, for the tests of its operators and of its kernels."""

import torch
from torch.nn import functional as F

from peft_fast.reference import lora as reference


def make(M, N, K, R, dtype, adapter_dtype=None, device="cpu"):
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(M, K, device=device, dtype=dtype)
    w = torch.randn(N, K, device=device, dtype=dtype) / K**0.5
    a = torch.randn(R, K, device=device, dtype=adapter_dtype) / K**0.5
    b = torch.randn(N, R, device=device, dtype=adapter_dtype)
    bias = torch.randn(N, device=device, dtype=dtype)
    return x, w, a, b, bias


def keep_of(x, p, seed):
    """The mask as numbers, from the op's own definition of it."""
    if p == 0:
        return torch.ones_like(x)
    bits = reference.dropout_bits(seed.cpu(), *x.shape, p).to(x.device)
    keep = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1
    return keep.flatten(1)[:, : x.shape[1]].to(x)


def plain(x, w, a, b, bias, scaling, keep, p):
    """The formula in plain torch, the adapters cast to the activations' dtype as under autocast."""
    low_rank = F.linear(F.linear(x * keep / (1 - p), a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, w, bias) + scaling * low_rank


def gradients(fn, tensors, dy):
    """[y, dx, da, db, dbias] of fn(x, a, b, bias); in ``tensors`` w is not a leaf."""
    x, w, a, b, bias = tensors
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, bias)]
    y = fn(leaves[0], w, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y))]
