"""Cases of kernels: one adapter, csrc_triton/lora. A size is (M, N, K, R), see kernels.py.

turned: a matrix as the backward gives it, the transpose of one in memory.
"""

import torch
from torch import Tensor

from .case import SCALING, Case, Setting, Size


def lora_shrink(on: Setting, size: Size, turned: bool = False) -> Case:
    """s = x @ a.T; turned: dS = dY @ b, with b.T for a."""
    from csrc_triton.lora.shrink import lora_shrink

    M, _, K, R = size
    return Case(
        lambda: (on.draw(M, K), _matrix(on, R, K, turned)),
        lambda x, a: lora_shrink(x, a, SCALING)[0],
        lambda D, x, a: SCALING * (x.to(D) @ a.to(D).T),
    )


def lora_expand(on: Setting, size: Size, turned: bool = False) -> Case:
    """y += s @ b.T; turned: dX += dS @ a, with a.T for b."""
    from csrc_triton.lora.expand import lora_expand

    M, N, _, R = size
    return Case(
        lambda: (on.draw(M, R), _matrix(on, N, R, turned), on.draw(M, N)),
        lambda s, b, base: lora_expand(s, b, base, torch.empty_like(base)),
        lambda D, s, b, base: base.to(D) + s.to(D) @ b.to(D).T,
    )


def lora_gemm(on: Setting, size: Size, turned: bool = False) -> Case:
    """Forward; turned: dX = dY @ w + dS @ a."""
    from csrc_triton.lora.gemm import lora_gemm

    M, N, K, R = size

    def weight() -> Tensor:
        return on.weight(K, N).T if turned else on.weight(N, K)

    return Case(
        lambda: (on.draw(M, K), weight(), on.draw(M, R), _matrix(on, N, R, turned)),
        lambda x, w, s, b: lora_gemm(x, w, None, s, b),
        lambda D, x, w, s, b: x.to(D) @ w.to(D).T + s.to(D) @ b.to(D).T,
    )


def lora_one_launch(on: Setting, size: Size) -> Case:
    """y and s."""
    from csrc_triton.lora.one_launch import lora_one_launch

    M, N, K, R = size

    def formula(D: torch.dtype, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        s = SCALING * (x.to(D) @ a.to(D).T)
        return x.to(D) @ w.to(D).T + s @ b.to(D).T, s

    return Case(
        lambda: (on.draw(M, K), on.weight(N, K), *on.factors(N, K, R)),
        lambda x, w, a, b: lora_one_launch(x, w, None, a, b, SCALING, 0.0, None)[:2],
        formula,
    )


def lora_grad(on: Setting, size: Size) -> Case:
    """dB with dS, then dA: both ask for the same size where t is as wide."""
    from csrc_triton.lora.grad import lora_da, lora_db_ds

    M, C, _, R = size

    def formula(D: torch.dtype, t: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        t, v = t.to(D), v.to(D)
        return t.T @ v, SCALING * (t @ b.to(D)), v.T @ t

    return Case(
        lambda: (on.draw(M, C), on.draw(M, R), on.draw(C, R, std=C**-0.5)),
        lambda t, v, b: (*lora_db_ds(t, v, b, SCALING, on.dtype), lora_da(t, v, None, on.dtype)),
        formula,
    )


def _matrix(on: Setting, rows: int, columns: int, turned: bool) -> Tensor:
    if turned:
        return on.draw(columns, rows, std=columns**-0.5).T
    return on.draw(rows, columns, std=columns**-0.5)
