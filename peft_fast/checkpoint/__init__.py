"""Adapter directories: names and paths, validated reading, atomic writing. Knows tensors, never modules or configs."""

from .atomic import locate, recover
from .hub import find_adapter
from .names import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    adapter_directory,
    check_adapter_name,
)
from .prompts import check_prompt_config, check_prompt_shapes
from .read import TensorInfo, WeightsFile, open_bin, open_safetensors, open_weights, read_config, tensor_info
from .validate import CheckedNames, check_config, check_finite, check_ranks, check_tensors
from .write import config_json, save_adapter

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "CheckedNames",
    "TensorInfo",
    "WeightsFile",
    "adapter_directory",
    "check_adapter_name",
    "check_config",
    "check_finite",
    "check_prompt_config",
    "check_prompt_shapes",
    "check_ranks",
    "check_tensors",
    "config_json",
    "find_adapter",
    "locate",
    "open_bin",
    "open_safetensors",
    "open_weights",
    "read_config",
    "recover",
    "save_adapter",
    "tensor_info",
]
