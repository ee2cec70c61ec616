"""LoRA on a model that transformers has split over processes (`tp_plan`): an adapter is split as its base layer is.

    column-wise   the base's output is split    B (N, R) is split along N, A is whole on every rank
    row-wise      the base's input is split     A (R, K) is split along K, its product summed over the ranks; B is whole

The parameters become DTensors and the module's forward is wrapped by transformers' rule for a linear layer, as in PEFT.
Nothing here imports torch.distributed before there is such a model.
"""

import re
import warnings
from typing import Any

# where the base takes whole inputs and returns whole outputs, an adapter that is whole on every rank is right
_WHOLE = ("colwise_gather_output", "colwise_rep", "embedding_rowwise", "embedding_colwise")


def split_like_base(model: Any, layer: Any, adapter_name: str, module_name: str) -> None:
    """Split a new adapter of a LoRA layer over the ranks, if the model's plan splits the base layer.

    Args:
        model: the base model. layer: the LoRA layer. module_name: the base layer's name in the model.
    """
    plan, mesh = _plan_and_mesh(model, module_name)
    if plan is None or plan in _WHOLE:
        return
    if plan not in ("colwise", "rowwise") or adapter_name not in layer.lora_A:
        warnings.warn(
            f'TP plan "{plan}" on the base layer {module_name} is not supported for LoRA. '
            "LoRA adapters will be created without tensor parallel hooks.",
            stacklevel=2,
        )
        return
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    style = ALL_PARALLEL_STYLES[plan]
    part = layer.lora_B[adapter_name] if plan == "colwise" else layer.lora_A[adapter_name]
    for name in list(part._parameters):
        style.shard_param(part, name, mesh)
    style.install_forward(part, mesh)


def _plan_and_mesh(model: Any, module_name: str) -> tuple[str | None, Any]:
    """How the model's plan splits a module, and the ranks that it is split over; (None, None) if it is not split."""
    mesh = getattr(model, "_device_mesh", None)
    settings = getattr(getattr(model, "config", None), "distributed_config", None)
    if mesh is None or (getattr(settings, "tp_size", None) or 1) <= 1:
        return None, None
    names = mesh.mesh_dim_names
    if names is not None and "tp" not in names:
        return None, None
    plan = (getattr(model, "tp_plan", None) or {}).get(re.sub(r"\.\d+(\.|$)", r".*\1", module_name))
    if plan is None:
        return None, None
    return plan, mesh["tp"] if mesh.ndim > 1 else mesh
