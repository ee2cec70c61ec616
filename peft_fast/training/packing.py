"""--packing of `peft-fast train`: the rows of a batch behind one another, without a token that fills up.

transformers' own collator, for models that keep such rows apart by their positions: each is asked once whether it does.
"""

from typing import Any

import torch

from ..jobs.errors import JobError
from .loop import keep_as_trained


def collator() -> Any:
    """Of rows as train_rows makes them: one row of tokens, labels and positions that begin again."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening()


def check(model: Any) -> None:
    """Raises: JobError for a model whose answers to a row depend on the row before it."""
    base = model.get_base_model()
    base.config.get_text_config().use_cache = False  # with a cache transformers takes packed rows for a single one
    rows = [[5, 6, 7, 8, 9, 10], [10, 9, 8, 7]]
    was_training = model.training
    model.eval()
    keep_as_trained(model)
    with torch.no_grad():
        alone = torch.cat([_logits(model, [row]) for row in rows])
        packed = _logits(model, rows)
    model.train(was_training)
    exact = next(base.parameters()).dtype == torch.float32
    if float((packed - alone).abs().max()) > (1e-3 if exact else 5e-2) * float(alone.std()):
        raise JobError(
            f"--packing: {type(base).__name__} does not keep rows apart that are packed together; leave --packing out"
        )


def _logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    batch = collator()([{"input_ids": row, "labels": row} for row in rows])
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[0].float()
    return logits
