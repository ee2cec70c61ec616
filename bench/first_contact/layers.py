"""One layer: LoRA beside the vendor's product and peft, dropout's masks, mixed batches."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peft_fast.ops.operators import MIXED_ONE_LAUNCH_MAX_M

from ..cases.kinds import MixedOpCase, OpCase
from ..subjects import lora_sites, mixed_sites
from ..subjects.lora_sites import DTYPES, SCALING
from ..subjects.subject import Call, Compared, TakesNoPart
from .here import Here, Row, configs, configured, measure_subject

SITES = {"q": (4096, 4096), "k": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096)}  # K, N of Llama-3-8B
_FORCED = ("torch", "addmm", "split", "one_launch")


def torch_name(dtype: str) -> str:
    """ "bf16" as the tables call it."""
    return str(DTYPES[dtype]).removeprefix("torch.")


class Lora(lora_sites.LoraSite):
    """An ``OpCase`` with every implementation by force, and for a token the configurations of the one launch."""

    @classmethod
    def providers(cls, case: OpCase, device: torch.device) -> Sequence[str]:
        names = ["base", "plain torch", "peft", "peft_fast", *(f"peft_fast:{name}" for name in _FORCED)]
        few = case.mode == "fwd" and case.M <= 16
        tried = configs("lora_one_launch", device, case.R, 3 * few, DTYPES[case.dtype].itemsize)
        return [*names, *(f"peft_fast:one_launch@{label}" for label in tried)]

    def compared(self, name: str) -> Compared:
        base, _, label = name.partition("@")
        return self._with(label, super().compared)(base)

    def runner(self, name: str) -> Call:
        base, _, label = name.partition("@")
        return self._with(label, super().runner(base))

    def _with(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        if not label:
            return call
        case = self.case
        config = configs("lora_one_launch", self.device, case.R, 3, DTYPES[case.dtype].itemsize)[label]
        return configured("lora_one_launch", config, call)


def lora_rows(case: OpCase, here: Here) -> Iterator[Row]:
    """An ``OpCase``."""
    about = dict(op="lora_linear", dtype=torch_name(case.dtype), adapters=torch_name(case.adapters), mode=case.mode)
    sizes = dict(M=case.M, N=case.N, K=case.K, R=case.R, dropout=case.dropout)
    session: Any = here
    yield from measure_subject(Lora(case, session), here, about | sizes)


# ---------------------------------------------------------------------------------------------------------- dropout
def dropout_rows(case: OpCase, here: Here) -> Iterator[Row]:
    """Masks bit by bit as plain torch draws them, y and the gradients with them as fp64 has it; of every kernel."""
    from peft_fast.ops.lora_linear import linear_bwd, linear_fwd
    from peft_fast.reference.dropout import dropout_bits, unpack_bits

    from .. import measure
    from .here import poisoned

    site, p = lora_sites.make_site(case, here.device, 0), case.dropout
    (w, a, b), x, dy = site.copies[0], site.x, site.dy
    seed = torch.tensor([123456789], device=here.device)
    bits = dropout_bits(seed, case.M, case.K, p)
    keep = unpack_bits(bits, case.K, torch.float64) != 0

    def exact(dtype: torch.dtype) -> list[Tensor]:
        """y, dx, da, db by the formula, computed in ``dtype``."""
        W, A, B, X, D, mask = (t.to(dtype) for t in (w, a, b, x, dy, keep))
        scale = SCALING / (1 - p)
        s, ds = scale * (X * mask) @ A.T, scale * D @ B
        return [X @ W.T + s @ B.T, D @ W + mask * (ds @ A), ds.T @ (X * mask), D.T @ s]

    truth, plain = exact(torch.float64), exact(x.dtype)
    for impl in _FORCED[1:]:
        row: Row = dict(op="lora_linear", impl=f"peft_fast:{impl}", mode="dropout", M=case.M, N=case.N, K=case.K)
        row |= dict(R=case.R, dropout=p, dtype=torch_name(case.dtype), adapters=torch_name(case.adapters))
        try:
            with poisoned():
                y, s, drawn = linear_fwd(x, w, None, a, b, SCALING, p, seed, impl)
                given = (dy, x, w, a, b, s, drawn, SCALING, p, [True, True, True])
                gradients = linear_bwd(*given, "addmm" if impl == "one_launch" else impl)
        except ValueError as reason:
            yield {**row, "note": f"takes no part: {reason}"}
            continue
        share = measure.error_over_budget([y, *gradients], plain, truth)[1]
        same = torch.equal(drawn, bits)
        yield {**row, "err_share": share, "ok": share <= 1 and same, "note": "" if same else "another mask"}


# ----------------------------------------------------------------------------------------------------- mixed batches
@dataclass(frozen=True)
class MixedRank16(MixedOpCase):
    """Adapters of rank 16 alone."""

    @property
    def ranks(self) -> list[int]:
        return [16] * self.adapters

    def tiny(self) -> "MixedRank16":
        return replace(self, K=64, N=48, M=3, adapters=min(self.adapters, 2))


class Mixed(mixed_sites.MixedLayer):
    """A ``MixedOpCase`` with every kernel by force, and configurations of the one launch."""

    def __init__(self, case: MixedOpCase, session: Any) -> None:
        super().__init__(case, session)
        self.runner = functools.cache(self._runner)  # type: ignore[method-assign]  # of peft's it takes a second

    @classmethod
    def providers(cls, case: MixedOpCase, device: torch.device) -> Sequence[str]:
        return [*mixed_sites.NAMES, *(f"peft_fast:one_launch@{label}" for label in cls._configs(case, device))]

    @staticmethod
    def _configs(case: MixedOpCase, device: torch.device) -> dict[str, dict[str, int]]:
        fits = case.M <= MIXED_ONE_LAUNCH_MAX_M
        return configs("mixed_one_launch", device, max(case.ranks), 3 * fits, rows=case.M)

    def compared(self, name: str) -> Compared:
        lora = name != "base"
        try:
            out = self.runner(name)(0)
        except ValueError as error:
            if "implementation" in str(error):
                raise TakesNoPart(str(error)) from error
            raise
        return Compared([out], [self.plain if lora else out], [mixed_sites.exact(self.site, lora)])

    def _runner(self, name: str) -> Call:
        base, _, label = name.partition("@")
        call = mixed_sites.runner(base, self.site)
        if not label:
            return call
        return configured("mixed_one_launch", self._configs(self.case, self.device)[label], call)


def mixed_rows(case: MixedOpCase, here: Here) -> Iterator[Row]:
    """A ``MixedOpCase``."""
    R = max(case.ranks)
    about = dict(op="lora_mixed", dtype="bfloat16", adapters=f"{case.adapters} bfloat16", mode="fwd")
    session: Any = here
    yield from measure_subject(Mixed(case, session), here, about | dict(M=case.M, N=case.N, K=case.K, R=R))
