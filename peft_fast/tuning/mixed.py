"""Cases of kernels: batches that mix adapters, csrc_triton/mixed. Sizes: kernels.py."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.mixed_plan import MixedPlan, MixedSite, mixed_plan
from .case import SCALING, Case, Setting, Size

ADAPTERS = 8  # in a batch, at most


@dataclass(frozen=True)
class Mix:
    """Adapters of one rank, a (L, R, K) and b (L, N, R), R a multiple of 8, and rows that take them in turn."""

    a: Tensor
    b: Tensor
    site: MixedSite
    plan: MixedPlan

    def update(self, D: torch.dtype, x: Tensor) -> Tensor:
        """scale * B_slot @ (A_slot @ x[m]), (M, N)."""
        return self.times_b(D, self.times_a(D, x))

    def times_a(self, D: torch.dtype, x: Tensor) -> Tensor:
        """A_slot @ x[m], (M, R), not scaled."""
        return self._by_slot(D, x, self.a)

    def times_b(self, D: torch.dtype, s: Tensor) -> Tensor:
        """scale * B_slot @ s[m], (M, N)."""
        return SCALING * self._by_slot(D, s, self.b)

    def _by_slot(self, D: torch.dtype, t: Tensor, matrices: Tensor) -> Tensor:
        out = torch.zeros((t.shape[0], matrices.shape[1]), dtype=D, device=t.device)
        for slot, matrix in enumerate(matrices):
            rows = self.plan.slots == slot
            out[rows] = t[rows].to(D) @ matrix.to(D).T
        return out


def draw_mix(on: Setting, M: int, N: int, K: int, R: int, adapters: int = ADAPTERS) -> Mix:
    """At most ``adapters`` of them, all of rank R."""
    L = min(M, adapters)
    a, b = on.draw(L, R, K, std=K**-0.5), on.draw(L, N, R, std=R**-0.5)
    addresses = [[a[i].data_ptr(), b[i].data_ptr()] for i in range(L)]
    site = MixedSite(
        torch.tensor(addresses, dtype=torch.int64, device=on.device),
        torch.full((L,), R, dtype=torch.int32, device=on.device),
        torch.full((L,), SCALING, dtype=torch.float32, device=on.device), on.dtype, max(16, R), 0,
    )  # fmt: skip
    return Mix(a, b, site, mixed_plan(torch.arange(M, dtype=torch.int32, device=on.device) % L, L, 1))


def _planes(on: Setting, M: int, R: int) -> Tensor:
    return torch.randn((4 if M <= 64 else 1, M, R), device=on.device)


def mixed_shrink(on: Setting, size: Size) -> Case:
    from csrc_triton.mixed.shrink import mixed_shrink

    M, _, K, R = size

    def run(x: Tensor, a: Tensor, mix: Mix) -> Any:
        site, plan = mix.site, mix.plan
        return mixed_shrink(x, site.addresses, site.ranks, site.dtype, R, plan.order, plan.blocks, plan.block_rows)

    def inputs() -> tuple[Any, ...]:
        mix = draw_mix(on, M, 16, K, R)
        return on.draw(M, K), mix.a, mix

    return Case(inputs, run, lambda D, x, a, mix: mix.times_a(D, x), lambda planes: planes.sum(0))


def mixed_expand(on: Setting, size: Size) -> Case:
    from csrc_triton.mixed.expand import mixed_expand

    M, N, _, R = size

    def run(y: Tensor, planes: Tensor, b: Tensor, mix: Mix) -> Any:
        site, plan = mix.site, mix.plan
        tables = (site.addresses, site.ranks, site.scales, site.dtype, on.dtype)
        return mixed_expand(planes, *tables, plan.order, plan.blocks, plan.block_rows, y)

    def inputs() -> tuple[Any, ...]:
        mix = draw_mix(on, M, N, 16, R)
        return on.draw(M, N), _planes(on, M, R), mix.b, mix

    return Case(inputs, run, lambda D, y, planes, b, mix: y.to(D) + mix.times_b(D, planes.to(D).sum(0)))


def mixed_gemm(on: Setting, size: Size) -> Case:
    from csrc_triton.mixed.gemm import mixed_gemm

    M, N, K, R = size

    def run(x: Tensor, w: Tensor, planes: Tensor, b: Tensor, mix: Mix) -> Any:
        site, plan = mix.site, mix.plan
        tables = (site.addresses, site.ranks, site.scales, site.dtype)
        return mixed_gemm(x, w, None, planes, *tables, plan.slots, plan.order)

    def inputs() -> tuple[Any, ...]:
        mix = draw_mix(on, M, N, 16, R)
        return on.draw(M, K), on.weight(N, K), _planes(on, M, R), mix.b, mix

    def formula(D: torch.dtype, x: Tensor, w: Tensor, planes: Tensor, b: Tensor, mix: Mix) -> Tensor:
        return x.to(D) @ w.to(D).T + mix.times_b(D, planes.to(D).sum(0))

    return Case(inputs, run, formula)


def mixed_one_launch(on: Setting, size: Size) -> Case:
    from csrc_triton.mixed.one_launch import mixed_one_launch

    M, N, K, R = size

    def run(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mix: Mix) -> Any:
        site, plan = mix.site, mix.plan
        tables = (site.addresses, site.ranks, site.scales, site.dtype, R, plan.order, plan.blocks, plan.block_rows)
        return mixed_one_launch(x, w, None, *tables, plan.counters[0])

    def inputs() -> tuple[Any, ...]:
        mix = draw_mix(on, M, N, K, R)
        return on.draw(M, K), on.weight(N, K), mix.a, mix.b, mix

    return Case(inputs, run, lambda D, x, w, a, b, mix: x.to(D) @ w.to(D).T + mix.update(D, x))
