"""PEFT's functions for models that are not a PeftModel: packages that inject adapters into their own models use them.

The functions on tensors are in `ops.functional`.
"""

from .mapping import inject_adapter_in_model
from .tuners.tuners_utils import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from .utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
