"""End to end: a random Llama of the 8B's sizes. A decode step, and a training step of eight layers."""

import copy
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import measure
from ..subjects.lora_models import llama_8b, lora_sites_of
from ..subjects.lora_sites import SCALING
from ..subjects.manage_cases import copy_adapter
from ..subjects.mixed_decode import static_step
from ..subjects.subject import Call
from .here import Here, Row, in_short, in_us

RANK = 16
_FAR = 0.1  # relative distance of two bf16 models' logits that is taken for the same


def adapted(base: Any, library: str, count: int, dtype: torch.dtype, dropout: float = 0.0) -> Any:
    """``base`` under peft or peft_fast, sharing its weights, with adapters "a0", ... in numbers that both have.

    dtype: of the adapters.

    Raises: ImportError where the library is not installed.
    """
    module = importlib.import_module(library)
    config = module.LoraConfig(
        r=RANK, lora_alpha=RANK * SCALING, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    meta = dict(low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    shared = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model = module.get_peft_model(shared, config, adapter_name="a0", **meta)
    for i in range(1, count):
        if library == "peft":
            copy_adapter(model, "a0", f"a{i}")
        else:
            model.add_adapter(f"a{i}", config, **meta)
    device = next(base.parameters()).device
    for i in range(count):
        generator = torch.Generator(device).manual_seed(i)
        for _, layer in lora_sites_of(model):
            for part in (layer.lora_A[f"a{i}"], layer.lora_B[f"a{i}"]):
                numbers = torch.randn(part.weight.shape, generator=generator, device=device) * 0.02
                part.weight = nn.Parameter(numbers.to(dtype), requires_grad=part.weight.requires_grad)
    return model


def _built(
    here: Here, base: Any, count: int, dtype: torch.dtype, dropout: float = 0.0
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """(library, model, or the error that keeps it away)."""
    for library in ("peft", "peft_fast"):
        try:
            yield library, adapted(base, library, count, dtype, dropout)
        except Exception as error:
            here.synchronize()
            yield library, error


# -------------------------------------------------------------------------------------------------------------- decode
def decode_rows(rows: int, count: int, here: Here) -> Iterator[Row]:
    """The next token of ``rows`` sequences: eager, and where it can be captured as a replay; ``count`` adapters."""
    base = llama_8b(here.device, layers=32, tiny=here.tiny_models)
    names = [f"a{i % count}" for i in range(rows)]
    about: Row = dict(op="decode step", mode="decode", dtype="bfloat16", adapters=f"{count} bfloat16", M=rows, R=RANK)
    about |= dict(N=base.config.intermediate_size, K=base.config.hidden_size)
    steps: dict[str, Call] = {"base": static_step(base, rows, {}, torch.bfloat16)}
    captured = ["base"]
    kept: list[Any] = []
    for library, model in _built(here, base, count, torch.bfloat16):
        if isinstance(model, Exception):
            yield {**about, "impl": library, "ok": isinstance(model, ImportError), "note": in_short(model)}
            continue
        kept.append(model.eval())
        given = {} if count == 1 else {"adapter_names": names}
        steps[library] = static_step(model, rows, given, torch.bfloat16)
        if library == "peft_fast":
            if count > 1:
                steps["peft_fast ids"] = static_step(
                    model, rows, {"adapter_ids": model.adapter_slots(names)}, torch.bfloat16
                )
            captured.append("peft_fast ids" if count > 1 else "peft_fast")
    truth = {"base": steps["base"](0).clone()}
    if kept:
        truth["lora"] = _by_formula(base, kept[-1], names, steps["base"])
    right: dict[str, Call] = {}
    for name, step in steps.items():
        try:
            share = distance(step(0), truth["base" if name == "base" else "lora"]) / _FAR
        except Exception as error:
            here.synchronize()
            yield {**about, "impl": name, "ok": False, "note": in_short(error)}
            continue
        if share <= 1:
            right[name] = step
        else:
            yield {**about, "impl": name, "ok": False, "err_share": share, "note": "wrong"}
    for name, times in here.times(right).items():
        yield {**about, "impl": name, **in_us(times), **_weights(base)}
    for name in captured:
        if name in right:
            yield {**about, "impl": name, "graph": True, **_replayed(right[name], here, _weights(base))}


def _replayed(step: Call, here: Here, work: Row) -> Row:
    try:
        eager = step(0).clone()
        graph = here.graphed(step, 1)
        if distance(graph(0), eager) > _FAR:
            return {"ok": False, "note": "the replay gives something else"}
        return {**in_us(here.times({"graph": graph})["graph"]), **work}
    except Exception as error:
        here.synchronize()
        return {"ok": False, "note": in_short(error)}


def _weights(base: Any) -> Row:
    size = sum(p.nbytes for name, p in base.named_parameters() if "embed" not in name)
    return {"work": {"flops": 0, "bytes": size, "dtype": "bf16"}}


def _by_formula(base: Any, model: Any, names: list[str], step: Callable[[int], Tensor]) -> Tensor:
    """The base's step with the updates added by plain torch."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    hooks = [
        base.get_submodule(site).register_forward_hook(partial(_add_updates, layer, rows))
        for site, layer in lora_sites_of(model)
    ]
    out = step(0).clone()
    for hook in hooks:
        hook.remove()
    return out


def _add_updates(layer: Any, rows: dict[str, list[int]], module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
    """A forward hook: what the adapters of ``layer`` add, in its own dtype."""
    y = y.clone()
    for name, at in rows.items():
        a, b = (getattr(layer, part)[name].weight for part in ("lora_A", "lora_B"))
        y[at] += SCALING * (args[0][at] @ a.T) @ b.T
    return y


def distance(out: Tensor, truth: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite where something is not finite."""
    far = ((out.double() - truth.double()).norm() / truth.double().norm()).item()
    return far if far == far else float("inf")


# ------------------------------------------------------------------------------------------------------ a training step
def training_rows(adapter_dtype: str, here: Here) -> Iterator[Row]:
    """Forward, loss and backward of eight layers at 8 x 512 tokens with dropout 0.05: time, and memory at its peak."""
    base = llama_8b(here.device, layers=8, tiny=here.tiny_models)
    base.config.use_cache = False
    rows, tokens = (2, 8) if here.rehearse else (8, 512)
    ids = torch.randint(0, base.config.vocab_size, (rows, tokens), device=here.device)
    about: Row = dict(op="training step", mode="train", dtype="bfloat16", adapters=adapter_dtype, R=RANK, dropout=0.05)
    about |= dict(M=rows * tokens, N=base.config.intermediate_size, K=base.config.hidden_size)
    steps: dict[str, Call] = {}
    losses: dict[str, float] = {}
    for library, model in _built(here, base, 1, getattr(torch, adapter_dtype), 0.05):
        if isinstance(model, Exception):
            yield {**about, "impl": library, "ok": isinstance(model, ImportError), "note": in_short(model)}
            continue
        try:
            with torch.no_grad():
                losses[library] = float(model.eval()(input_ids=ids, labels=ids).loss)
            steps[library] = _step(model.train(), ids)
            steps[library](0)
        except Exception as error:
            here.synchronize()
            steps.pop(library, None)
            yield {**about, "impl": library, "ok": False, "note": in_short(error)}
    if len(losses) == 2 and abs(losses["peft"] - losses["peft_fast"]) > 0.01 * losses["peft"]:
        yield {**about, "impl": "peft_fast", "ok": False, "note": f"another loss than peft's: {losses}"}
        return
    for name, times in here.times(steps).items() if steps else ():
        with measure.PeakMemory(here.device) as memory:
            steps[name](0)
        yield {**about, "impl": name, **in_us(times), "note": f"peak {memory.bytes} bytes", "peak_bytes": memory.bytes}


def _step(model: nn.Module, ids: Tensor) -> Call:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return lambda i: torch.autograd.grad(model(input_ids=ids, labels=ids).loss, wanted)
