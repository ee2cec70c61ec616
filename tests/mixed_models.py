"""Models with several adapters for the tests of mixed batches, and the same batch run row by row, by peft."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import peft
import torch
from families import FAMILIES, VOCAB, make_base, make_config, output_tensors
from torch import Tensor, nn

import peft_fast
from numerics import assert_as_accurate

BASE = "__base__"
ROWS, LENGTH = 5, 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_MORE = {
    "llama": ["o_proj", "gate_proj"],
    "qwen2": ["o_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["out_proj", "fc1", "fc2"],
    "bert": ["key", "intermediate.dense"],
    "roberta": ["key", "intermediate.dense"],
    "t5": ["o", "wi"],
    "bart": ["k_proj", "fc1"],
}


def settings(family: str) -> dict[str, dict[str, Any]]:
    """Three adapters that differ in all that may differ: ranks, scalings by layer, targets."""
    targets = FAMILIES[family][2]
    return {
        "a": {},
        "b": dict(r=8, target_modules=targets[:1], use_rslora=True, alpha_pattern={r".*\.1\..*": 2}),
        "c": dict(r=3, lora_alpha=5, target_modules=_MORE[family], rank_pattern={_MORE[family][-1]: 7}),
    }


def add_adapters(library: Any, base: nn.Module, family: str, task: str | None, adapters: dict[str, Any]) -> Any:
    """A PeftModel of `library` over a copy of `base`, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = {name: make_config(library, family, task, **changes) for name, changes in adapters.items()}
        first, *others = configs
        model = library.get_peft_model(copy.deepcopy(base), configs[first], adapter_name=first)
        for name in others:
            model.add_adapter(name, configs[name])
    return model.eval()


def randomize(model: nn.Module, seed: int = 5) -> None:
    """Random values in everything that belongs to an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))


def mixed_pair(
    family: str,
    task: str,
    adapters: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    base: nn.Module | None = None,
    **changes: Any,
) -> tuple[Any, Any]:
    """(peft's model, peft_fast's model) with the same adapters and weights; without gradients to adapters."""
    base = make_base(family, task, **changes) if base is None else base
    adapters = settings(family) if adapters is None else adapters
    theirs, ours = (add_adapters(lib, base.to(dtype), family, task, adapters) for lib in (peft, peft_fast))
    randomize(ours)
    result = theirs.load_state_dict(ours.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    return theirs, ours


def mixed_model(family: str = "llama", adapters: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """peft_fast's model alone, for causal language modelling."""
    adapters = settings(family) if adapters is None else adapters
    model = add_adapters(peft_fast, make_base(family, "CAUSAL_LM", **kwargs), family, "CAUSAL_LM", adapters)
    randomize(model)
    return model


def compositions(adapters: Sequence[str], count: int = 2, rows: int = ROWS) -> Iterator[list[str]]:
    """Random names for the rows of batches: the first has every adapter and rows without, in any order."""
    generator = torch.Generator().manual_seed(17)
    every = [*adapters, BASE]
    for seed in range(count):
        drawn = torch.randint(len(every), (rows,), generator=generator).tolist()
        if seed == 0:
            drawn[: len(every)] = range(len(every))
            drawn = [drawn[i] for i in torch.randperm(rows, generator=generator)]
        yield [every[i] for i in drawn]


def batch(task: str, side: str = "right", seed: int = 3, rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """Token ids and a mask; some rows are padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows, 2):
        mask[row, slice(-row, None) if side == "right" else slice(0, row)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (rows, length - 2), generator=generator)
    return inputs


def one_by_one(
    model: Any, inputs: dict[str, Tensor], names: Sequence[str], run: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """The outputs of each row alone with its adapter active, in one batch again; `run(model, **row)` is its forward."""
    rows: list[Any] = [None] * len(names)
    with torch.no_grad():
        for name in dict.fromkeys(names):
            if name != BASE:
                model.set_adapter(name)
            with model.disable_adapter() if name == BASE else nullcontext():
                for i in [i for i, other in enumerate(names) if other == name]:
                    row = {key: value[i : i + 1] for key, value in inputs.items()}
                    rows[i] = outputs(run(model, **row) if run else model(**row))
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def outputs(result: Any) -> dict[str, Tensor]:
    return {"output": result} if isinstance(result, Tensor) else output_tensors(result)


def together(model: Any, inputs: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The outputs of the batch, each row its own adapter."""
    with torch.no_grad():
        return outputs(model(**inputs, adapter_names=list(names)))


def assert_rows_right(
    got: dict[str, Tensor], theirs: Any, inputs: dict[str, Tensor], names: Sequence[str], exact: Any = None
) -> None:
    """`got` has at most twice the error of peft's one row at a time, against the same in fp64."""
    exact = copy.deepcopy(theirs).double() if exact is None else exact
    same, truth = one_by_one(theirs, inputs, names), one_by_one(exact, inputs, names)
    assert got.keys() == truth.keys()
    for key, value in got.items():
        assert_as_accurate(key, value, same[key], truth[key])


def logits(model: Any, **kwargs: Any) -> Tensor:
    """Logits of a fixed batch, without gradients."""
    with torch.no_grad():
        result: Tensor = model(**batch("CAUSAL_LM", seed=3), **kwargs).logits
    return result
