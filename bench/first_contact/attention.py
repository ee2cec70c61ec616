"""Attention of one layer with a prefix: peft's way, torch's two calls, peft_fast's kernels and flash by force."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases.kinds import PrefixSiteCase
from ..subjects import prefix_sites
from ..subjects.prefix_sites import PrefixTensors
from ..subjects.subject import Call, Compared, TakesNoPart
from .here import Here, Row, configs, configured, measure_subject
from .layers import torch_name

_NAMES = ("base", "peft", "two calls", "peft_fast", "peft_fast:flash", "peft_fast:kernel")
_DKV = "prefix_dkv"  # the kernel whose configurations are tried


def _forced(implementation: str, case: PrefixSiteCase, t: PrefixTensors) -> Tensor:
    from peft_fast.ops.functional import prefix_attention

    keys: dict[str, Any] = dict(starts=t.starts, lengths=t.lengths, max_length=case.prefix)
    keys |= dict(causal_offset=None if t.past else 0, implementation=implementation)
    out: Tensor = prefix_attention(t.q, *prefix_sites._own(t), t.prefix_k, t.prefix_v, **keys)[0]
    return out


class Attention(prefix_sites.PrefixAttention):
    """A ``PrefixSiteCase``."""

    @classmethod
    def providers(cls, case: PrefixSiteCase, device: torch.device) -> Sequence[str]:
        tried = configs(_DKV, device, case.head_size, 2) if (case.mode, case.dtype) == ("train", "bf16") else {}
        return [*_NAMES, *(f"peft_fast:kernel@{label}" for label in tried)]

    def compared(self, name: str) -> Compared:
        prefix, impl = name != "base", name.partition("@")[0]
        outputs = self._with(name, prefix_sites.outputs)
        try:
            out = outputs(self._attention(impl), self.case, self.site.copies[0], prefix)
        except ValueError as error:
            if "implementation" in str(error):
                raise TakesNoPart(str(error)) from error
            raise
        return Compared(out, self._plain if prefix else out, self._exact[prefix])

    def runner(self, name: str) -> Call:
        """As ``prefix_sites.runner``."""
        attention, case, copies = self._attention(name.partition("@")[0]), self.case, self.site.copies
        if case.mode != "train":

            @torch.no_grad()
            def forward(i: int) -> Tensor:
                return attention(case, copies[i % len(copies)])

            return forward
        t = copies[0].with_leaves(copies[0].q.dtype)
        wanted = [t.q, t.k, t.v, *((t.prefix_k, t.prefix_v) if name != "base" else ())]
        return self._with(name, lambda i: torch.autograd.grad(attention(case, t), wanted, t.dout))

    def _attention(self, impl: str) -> Callable[[PrefixSiteCase, PrefixTensors], Tensor]:
        _, _, forced = impl.partition(":")
        return partial(_forced, forced) if forced else prefix_sites.PROVIDERS[impl]

    def _with(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        label = name.partition("@")[2]
        return configured(_DKV, configs(_DKV, self.device, self.case.head_size, 2)[label], call) if label else call


def prefix_rows(case: PrefixSiteCase, here: Here) -> Iterator[Row]:
    """A ``PrefixSiteCase``: M is the rows, N the tokens, K the size of a head, R the length of the prefix."""
    about = dict(op="prefix_attention", dtype=torch_name(case.dtype), mode=case.mode)
    sizes = dict(M=case.rows, N=case.tokens, K=case.head_size, R=case.prefix)
    session: Any = here
    yield from measure_subject(Attention(case, session), here, about | sizes)
