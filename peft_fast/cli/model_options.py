"""--model and --adapter of `peft-fast tune` and `peft-fast info`: a model with adapted layers, or its shape alone."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..jobs.errors import JobError, UsageError
from ..training.options import QUANTIZE

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


def add_to(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options that say which model."""
    add = parser.add_argument
    add("--model", type=Path, required=required, metavar="DIR", help="the base model, saved by transformers")
    add("--adapter", type=Path, metavar="DIR", help="an adapter for it (default: LoRA on all its linear layers)")
    add("--r", type=int, default=16, metavar="N", help="without --adapter: its rank (default: 16)")
    add(
        "--tokens",
        type=int,
        nargs="+",
        default=[1, 16, 2048],
        metavar="N",
        help="rows of a call, as tokens of a batch (default: 1 16 2048)",
    )
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ... (default: auto)")
    add("--dtype", choices=DTYPES, help="of the base model (default: that of its file)")
    add("--quantize", choices=QUANTIZE, default="none", help="the base, by bitsandbytes, as in `peft-fast train`")


def load(args: argparse.Namespace, device: "torch.device") -> Any:
    """The model with its adapter on ``device``; on the meta device its shape alone, without a weight read.

    Raises: UsageError for directories that are no model and no adapter, and numbers that cannot be used; JobError
        for files that cannot be loaded.
    """
    import torch
    import transformers
    from transformers.utils import logging

    from peft_fast import LoraConfig, PeftModel, get_peft_model

    if args.r < 1:
        raise UsageError(f"--r {args.r}: expected a rank of at least 1")
    if min(args.tokens) < 1:
        raise UsageError(f"--tokens {min(args.tokens)}: expected at least 1")
    if not (args.model / "config.json").is_file():
        raise UsageError(f"--model {args.model}: expected the directory of a model, with config.json")
    if args.adapter is not None and not (args.adapter / "adapter_config.json").is_file():
        raise UsageError(f"--adapter {args.adapter}: expected the directory of an adapter, with adapter_config.json")
    logging.disable_progress_bar()
    meta = device.type == "meta"
    try:
        config = transformers.AutoConfig.from_pretrained(args.model, local_files_only=True)
        auto: Any = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto = transformers.AutoModelForSeq2SeqLM
        dtype = getattr(torch, args.dtype) if args.dtype else config.dtype or torch.float32
        quantized = _quantization(args, config, dtype)
        if meta:
            base = _skeleton(auto, config, dtype, quantized)
        else:
            options = {} if quantized is None else {"quantization_config": quantized}
            where = {"": str(device)}
            base = auto.from_pretrained(args.model, dtype=dtype, local_files_only=True, device_map=where, **options)
    except UsageError:
        raise
    except Exception as error:  # transformers raises anything for files that are wrong
        raise JobError(f"--model {args.model}: {error}") from error
    if args.adapter is None:
        task = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
        return get_peft_model(base, LoraConfig(r=args.r, target_modules="all-linear", task_type=task)).eval()
    try:
        place: Any = {"low_cpu_mem_usage": True, "torch_device": "cpu"} if meta else {}
        return PeftModel.from_pretrained(base, args.adapter, **place).eval()
    except Exception as error:  # also what safetensors raises
        raise JobError(f"--adapter {args.adapter}: {error}") from error


def _quantization(args: argparse.Namespace, config: Any, dtype: "torch.dtype") -> Any:
    """transformers' configuration of how bitsandbytes quantizes the base: that of its file, or --quantize; or None."""
    from transformers import BitsAndBytesConfig

    from ..training.model import quantization

    own = getattr(config, "quantization_config", None)
    if own is not None and args.quantize != "none":
        raise UsageError(f"--quantize {args.quantize}: {args.model} is quantized already")
    if own is not None and dict(own).get("quant_method") == "bitsandbytes":
        return BitsAndBytesConfig.from_dict(dict(own))
    return None if args.quantize == "none" else quantization(args.quantize, dtype)


def _skeleton(auto: Any, config: Any, dtype: "torch.dtype", quantized: Any) -> Any:
    """The model without weights, quantized layers as bitsandbytes' own."""
    import torch

    with torch.device("meta"):
        base = auto.from_config(config, dtype=dtype)
        if quantized is not None:
            from transformers.integrations.bitsandbytes import replace_with_bnb_linear

            base = replace_with_bnb_linear(base, ["lm_head"], quantized)
    return base
