"""Calls of every launcher at the kinds of sizes that models have: what a launch specialises on differs between them.

A size of 1 becomes a constant, a multiple of 16 is promised to be one, an absent tensor is None. Decoding has many of
these, and neither the interpreter nor the ahead-of-time check compiles them. Tensors are on the CPU and hold nothing:
no kernel runs.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

Call = tuple[str, Callable[[], Any]]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def every(family: str, wide: bool) -> Iterator[Call]:
    """(label, call) of a family: "lora", "mixed", "prefix" or "quantized".

    wide: all kinds, else those of a decode and a training step.
    """
    return {"lora": _lora, "mixed": _mixed, "prefix": _prefix, "quantized": _quantized}[family](wide)


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _lora(wide: bool) -> Iterator[Call]:
    from csrc_triton.lora.linear import lora_linear_fwd, lora_update_fwd
    from csrc_triton.lora.linear_bwd import lora_linear_bwd

    rows, ranks = ((1, 5, 300), (8, 64)) if wide else ((1, 300), (16,))
    sizes = [(M, 256, 256, R) for M, R in itertools.product(rows, ranks)]
    sizes += [(1, 1, 7, 1), (37, 50, 65, 5), (1, 1, 1, 1), (37, 33, 31, 40), (3, 256, 256, 128)] * wide
    dtypes = ((BF16, FP32), (FP32, FP32)) if wide else ((BF16, FP32),)
    for (M, N, K, R), (dtype, adapters), p in itertools.product(sizes, dtypes, (0.0, 0.05)):
        x, w, bias, dy = (zeros(*s, dtype=dtype) for s in ((M, K), (N, K), (N,), (M, N)))
        a, b, s = zeros(R, K, dtype=adapters), zeros(N, R, dtype=adapters), zeros(M, R, dtype=dtype)
        seed = torch.zeros(1, dtype=torch.int64) if p else None
        bits = torch.zeros((M, (K + 7) // 8) if p else (0, 0), dtype=torch.uint8)
        label = f"{M}x{N}x{K} r{R} {dtype} {adapters} p{p}"
        for how in ("split", "addmm", "one_launch"):
            if how == "one_launch" and M * R > 16384:
                continue
            args = (x, w, bias if M % 2 else None, a, b, 2.0, p, seed, how)
            yield f"forward {how} {label}", lambda args=args: lora_linear_fwd(*args)
            if how != "one_launch":
                args = (dy, x, w, a, b, s, bits, 2.0, p, [True] * 3, how)
                yield f"backward {how} {label}", lambda args=args: lora_linear_bwd(*args)
        yield f"update {label}", lambda args=(dy, x, a, b, 2.0, p, seed, "split"): lora_update_fwd(*args)
        only = (dy, x, None, a, b, s, bits, 2.0, p, [True, True, False], "split")
        yield f"backward of an update {label}", lambda args=only: lora_linear_bwd(*args)


def _plan(M: int, slots: int) -> tuple[Any, ...]:
    from peft_fast.ops.mixed_plan import mixed_plan

    return tuple(mixed_plan(torch.zeros(M, dtype=torch.int32), slots, 3))


def _site(slots: int, adapters: torch.dtype, rank: int) -> tuple[Any, ...]:
    addresses = torch.zeros(slots, 2, dtype=torch.int64)
    return addresses, torch.zeros(slots, dtype=torch.int32), torch.zeros(slots), adapters, rank, 0


def _mixed(wide: bool) -> Iterator[Call]:
    from csrc_triton.mixed.linear import lora_embedding_mixed, lora_linear_mixed, lora_update_mixed
    from csrc_triton.mixed.plan import mixed_plan

    rows, slots = ((1, 5, 32, 64, 600), (1, 128)) if wide else ((1, 32), (8,))
    dtypes = ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)) if wide else ((BF16, BF16),)
    for M, L, (dtype, adapters), rank in itertools.product(rows, slots, dtypes, (16, 64) if wide else (16,)):
        x, w = zeros(M, 256, dtype=dtype), zeros(256, 256, dtype=dtype)
        plan, site = _plan(M, L), _site(L, adapters, rank)
        label = f"{M} rows {L} slots {dtype} {adapters} r{rank}"
        for how in ("grouped", "split", *(("one_launch",) if M <= 64 else ())):
            yield f"mixed {how} {label}", lambda a=(x, w, None, *site, *plan, how): lora_linear_mixed(*a)
        slots = torch.zeros(M, dtype=torch.int32)
        yield f"plan {label}", lambda a=(slots, L, 3, 16): mixed_plan(*a)
        yield f"mixed update {label}", lambda a=(x, x, *site, *plan, "grouped"): lora_update_mixed(*a)
        ids = torch.zeros(M, dtype=torch.int64)
        yield f"embedding {label}", lambda a=(x, ids, *site, *plan, 1000, "grouped"): lora_embedding_mixed(*a)


def _prefix(wide: bool) -> Iterator[Call]:
    sizes: list[tuple[int, ...]] = [(2, 8, 2, 128, 128, 16, 128), (2, 8, 2, 1, 160, 20, 128)]  # B, H, KV, L, S, T, D
    if wide:
        sizes += [
            (1, 1, 1, 1, 1, 1, 64), (1, 8, 2, 1, 64, 16, 64), (1, 4, 4, 256, 256, 1, 64), (3, 8, 2, 300, 300, 20, 64),
            (2, 8, 8, 128, 0, 16, 64), (2, 8, 2, 128, 128, 0, 128),
            *((2, 4, 2, 70, 70, 9, D) for D in (1, 80, 256)),
        ]  # fmt: skip
    for (B, H, KV, L, S, T, D), dtype in itertools.product(sizes, (BF16, FP32) if wide else (BF16,)):
        label = f"B{B} H{H} KV{KV} L{L} S{S} T{T} D{D} {dtype}"
        q, dout = (zeros(B, L, H, D, dtype=dtype).transpose(1, 2), zeros(B, L, H, D, dtype=dtype))
        k, prefix = zeros(B, KV, S, D, dtype=dtype), zeros(T, KV, D, dtype=dtype)
        row = torch.zeros(B, dtype=torch.int32)
        for rows, extra in ((None, "causal"), (row, "mask"), *(((row, "all"), (None, "window")) if wide else ())):
            options = _prefix_options(extra, rows, B, H, L, S, T, D, dtype)
            yield from _prefix_calls(f"{label} {extra}", q, k, prefix, dout, options)


def _prefix_options(
    extra: str, rows: torch.Tensor | None, B: int, H: int, L: int, S: int, T: int, D: int, dtype: torch.dtype
) -> tuple[Any, ...]:  # fmt: skip
    mask, bias, sinks, past, seed, offset, window, softcap, p = None, None, None, None, None, S - L, None, 0.0, 0.0
    if extra == "mask":
        mask, offset = torch.ones(B, 1, L, S, dtype=torch.bool), None
    elif extra == "window":
        past, window = torch.zeros(1, dtype=torch.int64), 64
    elif extra == "all":
        mask, offset = zeros(B, 1, L, S, dtype=dtype), None
        bias, sinks, softcap = zeros(1, H, L, T, dtype=dtype), torch.zeros(H), 30.0
        seed, p = torch.zeros(1, dtype=torch.int64), 0.1
    return rows, rows, rows, T, mask, bias, sinks, past, seed, D**-0.5, offset, window, softcap, p


def _prefix_calls(
    label: str, q: torch.Tensor, k: torch.Tensor, prefix: torch.Tensor, dout: torch.Tensor, options: tuple[Any, ...]
) -> Iterator[Call]:  # fmt: skip
    from csrc_triton.prefix.attention import prefix_attention_fwd
    from csrc_triton.prefix.attention_bwd import prefix_attention_bwd

    B, H, L, D = q.shape
    yield f"attention {label}", lambda: prefix_attention_fwd(q, k, k, prefix, prefix, *options)
    if L > 1:
        out = zeros(B, L, H, D, dtype=q.dtype), torch.zeros(B, H, L)
        args = (dout, q, k, k, prefix, prefix, *out, *options, [True] * 4)
        yield f"attention backward {label}", lambda: prefix_attention_bwd(*args)


def _quantized(wide: bool) -> Iterator[Call]:
    from csrc_triton.quantized.fourbit import Nested, dequantize
    from csrc_triton.quantized.fourbit_codes import NF4
    from csrc_triton.quantized.fourbit_linear import fourbit_linear, fourbit_mixed
    from csrc_triton.quantized.int8_linear import lora_linear_int8

    code = torch.tensor(NF4)
    dtypes, rows = ((BF16, FP16, FP32), (1, 5, 64)) if wide else ((BF16,), (1,))
    for (N, K, size), nested, dtype in itertools.product(((256, 256, 64), (50, 128, 64)), (False, True), dtypes):
        packed, count = torch.zeros(N * K // 2, dtype=torch.uint8), -(-N * K // size)
        absmax = torch.zeros(count, dtype=torch.uint8 if nested else FP32)
        second = Nested(torch.zeros(256), torch.zeros(-(-count // 256)), torch.zeros(()), 256) if nested else None
        label = f"{N}x{K} {dtype} {'nested' if nested else 'plain'}"
        yield f"dequantize {label}", lambda a=(packed, code, absmax, size, (N, K), dtype, second): dequantize(*a)
        weight = (packed, code, absmax, size, N, "nf4", second)
        for M, R in itertools.product(rows, (0, 8)):
            a, b = (torch.zeros(R, K), torch.zeros(N, R)) if R else (None, None)
            args = (zeros(M, K, dtype=dtype), *weight, None, a, b, 2.0)
            yield f"4 bits {M} rows r{R} {label}", lambda args=args: fourbit_linear(*args)
        for M in rows:
            addresses, ranks, scales, adapters, rank, _ = _site(8, dtype, 16)
            _, order, blocks, counters, block_rows = _plan(M, 8)
            table = (addresses, ranks, scales, adapters, rank, order, blocks, block_rows, counters[0])
            args = (zeros(M, K, dtype=dtype), *weight, None, *table)
            yield f"4 bits mixed {M} rows {label}", lambda args=args: fourbit_mixed(*args)
    for M, dtype, R in itertools.product((1, 5, 64, 300) if wide else (1, 300), dtypes, (8, 64) if wide else (16,)):
        values, scales = torch.zeros(256, 256, dtype=torch.int8), torch.zeros(256)
        weight = values, scales, None, torch.zeros(R, 256), torch.zeros(256, R)
        args = (zeros(M, 256, dtype=dtype), *weight, 2.0, 0.0, "kernel")
        yield f"int8 {M} rows r{R} {dtype}", lambda args=args: lora_linear_int8(*args)
