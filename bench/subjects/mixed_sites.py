"""Mixed batches at one linear layer: the base, plain torch, peft's layer, peft_fast, on a GPU each of its kernels."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cases.kinds import MixedOpCase
from .lora_sites import SCALING
from .subject import Compared, Subject, Work

if TYPE_CHECKING:
    from ..session import Session

NAMES = ("base", "plain torch", "peft", "peft_fast", *(f"peft_fast:{n}" for n in ("grouped", "one_launch", "split")))


@dataclass
class MixedWeights:
    """w (N, K) and the adapters: a (R, K) and b (N, R) of each."""

    w: Tensor
    pairs: list[tuple[Tensor, Tensor]]


@dataclass
class MixedSiteData:
    """The tensors of a case; ``copies`` of the weights that overflow the cache twice, as in a model."""

    case: MixedOpCase
    x: Tensor
    copies: list[MixedWeights]


def make_site(case: MixedOpCase, device: torch.device, cache_bytes: int) -> MixedSiteData:
    """Random bf16 tensors as large as a trained model's."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).bfloat16()

    count = min(16, 1 + 2 * cache_bytes // (2 * case.N * case.K))
    copies = [
        MixedWeights(
            random(case.N, case.K, std=case.K**-0.5),
            [(random(R, case.K, std=case.K**-0.5), _aligned(random(case.N, R, std=R**-0.5))) for R in case.ranks],
        )
        for _ in range(count)
    ]
    return MixedSiteData(case, random(case.M, case.K, std=1.0), copies)


def _aligned(b: Tensor) -> Tensor:
    """b with rows that start at 16 bytes, as the adapter bank keeps them."""
    N, R = b.shape
    memory = b.new_zeros(N, -(-R // 8) * 8)
    memory[:, :R] = b
    return memory[:, :R]


def providers(case: MixedOpCase, device: torch.device) -> list[str]:
    """Who takes part: kernels run on a GPU only."""
    from peft_fast.ops.operators import MIXED_ONE_LAUNCH_MAX_M

    on_gpu = device.type == "cuda"
    left_out = set() if on_gpu else {name for name in NAMES if ":" in name}
    left_out |= {"peft_fast:one_launch"} if case.M > MIXED_ONE_LAUNCH_MAX_M else set()
    return [name for name in NAMES if name not in left_out]


def groups_of(case: MixedOpCase, device: torch.device) -> dict[int, Tensor]:
    """The rows of each adapter."""
    slots = torch.tensor(case.slots)
    return {slot: (slots == slot).nonzero()[:, 0].to(device) for slot in sorted(set(case.slots))}


def by_formula(x: Tensor, weights: MixedWeights, groups: dict[int, Tensor]) -> Tensor:
    """One adapter after the other, in x's dtype."""
    y = F.linear(x, weights.w.to(x.dtype))
    for slot, rows in groups.items():
        a, b = (t.to(x.dtype) for t in weights.pairs[slot])
        y.index_add_(0, rows, F.linear(F.linear(x[rows], a), b), alpha=SCALING)
    return y


def plain(site: MixedSiteData) -> Tensor:
    """What plain torch in bf16 makes of it: the measure of the errors."""
    return by_formula(site.x, site.copies[0], groups_of(site.case, site.x.device))


def exact(site: MixedSiteData, lora: bool) -> Tensor:
    """y in fp64."""
    return by_formula(site.x.double(), site.copies[0], groups_of(site.case, site.x.device) if lora else {})


def runner(provider: str, site: MixedSiteData) -> Callable[[int], Any]:
    """The function to time: call i uses copy i of the weights."""
    count, x = len(site.copies), site.x
    calls: list[Callable[[], Any]] = [_call(provider, site, weights, x) for weights in site.copies]

    @torch.no_grad()
    def forward(i: int) -> Any:
        return calls[i % count]()

    return forward


def _call(provider: str, site: MixedSiteData, weights: MixedWeights, x: Tensor) -> Callable[[], Any]:
    case = site.case
    if provider == "base":
        return lambda: F.linear(x, weights.w)
    if provider == "plain torch":
        groups = groups_of(case, x.device)
        return lambda: by_formula(x, weights, groups)
    if provider == "peft":
        layer, names = _peft_layer(case, weights), [f"a{slot}" for slot in case.slots]
        return lambda: layer(x, adapter_names=names)
    from peft_fast.ops.functional import lora_linear_mixed, mixed_plan

    table = _table(weights, x.device)
    plan = mixed_plan(torch.tensor(case.slots, dtype=torch.int32, device=x.device), case.adapters, 1)
    implementation = provider.partition(":")[2] or None
    return lambda: lora_linear_mixed(x, weights.w, table, plan, implementation=implementation)


def _table(weights: MixedWeights, device: torch.device) -> Any:
    """The adapters as the bank's table shows them to kernels. The tensors belong to the site, which outlives it."""
    from peft_fast.ops.functional import MixedSite

    ranks = [a.shape[0] for a, _ in weights.pairs]
    return MixedSite(
        torch.tensor([[a.data_ptr(), b.data_ptr()] for a, b in weights.pairs], dtype=torch.int64, device=device),
        torch.tensor(ranks, dtype=torch.int32, device=device),
        torch.full((len(ranks),), SCALING, dtype=torch.float32, device=device),
        torch.bfloat16, max(16, 1 << (max(ranks) - 1).bit_length()), 0,
    )  # fmt: skip


def _peft_layer(case: MixedOpCase, weights: MixedWeights) -> Any:
    library = importlib.import_module("peft")
    base = nn.Linear(case.K, case.N, bias=False, device="meta")
    base.weight = nn.Parameter(weights.w, requires_grad=False)
    holder = nn.Sequential(base)
    for slot, (a, b) in enumerate(weights.pairs):
        rank = a.shape[0]
        config = library.LoraConfig(r=rank, lora_alpha=rank * SCALING, target_modules=["0"])
        library.inject_adapter_in_model(config, holder, adapter_name=f"a{slot}")
        layer: Any = holder[0]
        layer.lora_A[f"a{slot}"].weight = nn.Parameter(a, requires_grad=False)
        layer.lora_B[f"a{slot}"].weight = nn.Parameter(b, requires_grad=False)
    return layer.eval()


class MixedLayer(Subject):
    """A ``MixedOpCase``."""

    group = "mixed batch, one layer"
    rivals = ("plain torch", "peft")

    def __init__(self, case: MixedOpCase, session: "Session") -> None:
        super().__init__(case, session)
        self.site = make_site(case, session.device, session.cache_bytes)
        self.plain = plain(self.site)

    @classmethod
    def providers(cls, case: MixedOpCase, device: torch.device) -> Sequence[str]:
        return providers(case, device)

    def compared(self, name: str) -> Compared:
        lora = name != "base"
        out = runner(name, self.site)(0)
        return Compared([out], [self.plain if lora else out], [exact(self.site, lora)])

    def runner(self, name: str) -> Callable[[int], Any]:
        return runner(name, self.site)

    def work(self, name: str) -> Work:
        return Work(self.case.flops(name != "base"), self.case.bytes(name != "base"), "bf16")

    def capturable(self, name: str) -> int:
        """Loops over adapters on the host cannot be captured."""
        return 0 if name in ("plain torch", "peft") else max(4, len(self.site.copies))

    def tokens(self) -> int:
        return int(self.case.M)
