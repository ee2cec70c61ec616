"""Gradients of a LoRA's two matrices: g[c, r] = sum_m keep[m, c] * t[m, c] * v[m, r], in one pass over the tall t.

    dB   t = dY (M, N)   v = s (M, R)    no mask; with b, the same pass also gives dS = dY @ b
    dA   t = x  (M, K)   v = dS (M, R)   bits (M, ceil(K / 8)), the forward's keep mask, or None

A program owns a block of columns and ROWS rows: its part of g stays in registers, its part of dS goes to an fp32
plane of its own. Planes are added in a fixed order (planes.py): deterministic, no atomics. Blocks of ranks beyond the
first re-read t (from L2). Accumulates in fp32.
Traffic: M*C elements + 8 bytes * R * M * C * (1 / ROWS + 1 / BLOCK_C) of planes; the second part only with dS.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks, x_type
from ..common.dropout import expand_bits
from ..common.launch import launch
from ..common.planes import sum_planes
from ..common.tuning import ALWAYS, ARCHS, HOPPER, SMALL, Candidate, block_r, candidates, cdiv, config_for
from .shrink import lora_shrink

# ROWS: rows of t that one program sums over
CANDIDATES = candidates("lora_grad", [
    Candidate(dict(BLOCK_M=64, BLOCK_C=128, LARGEST_R=64, ROWS=1024), 8, 3, HOPPER, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=64, BLOCK_C=64, LARGEST_R=64, ROWS=1024), 4, 3, ("sm_80", "sm_90"), default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_C=256, LARGEST_R=64, ROWS=1024), 8, 3, ("sm_90",)),
    Candidate(dict(BLOCK_M=32, BLOCK_C=64, LARGEST_R=64, ROWS=1024), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_C=32, LARGEST_R=32, ROWS=1024), 4, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit
def _lora_grad_kernel(
    t_ptr, v_ptr, bits_ptr, b_ptr, g_ptr, ds_ptr,
    scale, M, C, R, rows_per_program,
    stride_tm, stride_tc, stride_vm, stride_vr, stride_bitsm, stride_bc, stride_br,
    stride_gp, stride_gc, stride_gr, stride_dsp,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums one (BLOCK_C, BLOCK_R) tile of g over rows_per_program rows. With b, its share of dS too."""
    pid_c = tl.program_id(0)
    offs_c = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * rows_per_program
    rows = tl.arange(0, BLOCK_M)
    offs_m = first.to(tl.int64) + rows
    mask_c, mask_r = offs_c < C, offs_r < R
    t_ptrs = t_ptr + offs_m[:, None] * stride_tm + offs_c[None, :] * stride_tc
    v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_r[None, :] * stride_vr
    if bits_ptr is not None:
        offs_byte = pid_c.to(tl.int64) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        bits_ptrs = bits_ptr + offs_m[:, None] * stride_bitsm + offs_byte[None, :]
    if b_ptr is not None:
        b_ptrs = b_ptr + offs_c[:, None] * stride_bc + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)  # (BLOCK_C, BLOCK_R)
        b = b.to(t_ptr.dtype.element_ty)
        ds_ptrs = ds_ptr + pid_c.to(tl.int64) * stride_dsp + offs_m[:, None] * R + offs_r[None, :]

    step = tl.cast(BLOCK_M, tl.int64)  # hidden[:, -1] of a long context has row strides near 2^31 / BLOCK_M
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m in range(first, min(first + rows_per_program, M), BLOCK_M):
        mask_m = (m + rows < M)[:, None]
        t = tl.load(t_ptrs, mask=mask_m & mask_c[None, :], other=0.0)  # (BLOCK_M, BLOCK_C)
        v = tl.load(v_ptrs, mask=mask_m & mask_r[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        if bits_ptr is not None:
            byte = tl.load(bits_ptrs, mask=mask_m & (offs_byte * 8 < C)[None, :], other=0)
            t = tl.where(expand_bits(byte, BLOCK_M, BLOCK_C), t, tl.zeros_like(t))
            bits_ptrs += step * stride_bitsm
        acc = tl.dot(tl.trans(t), v, acc, input_precision="ieee")
        if b_ptr is not None:
            ds = tl.dot(t, b, input_precision="ieee") * tl.cast(scale, tl.float32)
            tl.store(ds_ptrs, ds.to(ds_ptr.dtype.element_ty), mask=mask_m & mask_r[None, :])
            ds_ptrs += step * R
        t_ptrs += step * stride_tm
        v_ptrs += step * stride_vm

    g_ptr += tl.program_id(1).to(tl.int64) * stride_gp
    g_ptrs = g_ptr + offs_c[:, None] * stride_gc + offs_r[None, :] * stride_gr
    tl.store(g_ptrs, acc.to(g_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_r[None, :])


def lora_da(x: Tensor, ds: Tensor, bits: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dA (R, K) = dS.T @ (keep * x) in ``dtype``. Trusts its caller."""
    return _launch(x, ds, bits, None, 1.0, dtype, transposed=True)[0]


def lora_db(dy: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """dB (N, R) = dY.T @ s in ``dtype``. Trusts its caller."""
    return _launch(dy, s, None, None, 1.0, dtype)[0]


def lora_db_ds(dy: Tensor, s: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dB as ``lora_db``, and dS (M, R) = scale * dY @ b in dY's dtype, in one pass over dY. Trusts its caller.

    Each block of columns writes a plane of dS and reads it again: where that is more than reading dY a second time
    (large ranks), it is two passes.
    """
    (M, N), R = dy.shape, s.shape[1]
    if 8 * R > config_for("lora_grad", dy, M, N, 0, R)["BLOCK_C"] * dy.element_size():
        return lora_db(dy, s, dtype), lora_shrink(dy, b.T, scale)[0]
    return _launch(dy, s, None, b, scale, dtype)


def _launch(
    t: Tensor, v: Tensor, bits: Tensor | None, b: Tensor | None,
    scale: float, dtype: torch.dtype, transposed: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return g, (C, R) or transposed, in ``dtype``, and dS (empty without b). M > 0; one plane is the result itself."""
    (M, C), R = t.shape, v.shape[1]
    config = config_for("lora_grad", t, M, C, 0, R)
    BLOCK_M, BLOCK_R = config["BLOCK_M"], block_r(R, config["LARGEST_R"])
    rows = cdiv(config["ROWS"], BLOCK_M) * BLOCK_M
    blocks_c, chunks = cdiv(C, config["BLOCK_C"]), cdiv(M, rows)
    planes = t.new_empty((chunks, *((R, C) if transposed else (C, R))), dtype=dtype if chunks == 1 else torch.float32)
    ds_planes = t.new_empty((0 if b is None else blocks_c, M, R), dtype=t.dtype if blocks_c == 1 else torch.float32)
    if planes.numel():
        stride_g = planes.stride()
        launch(
            _lora_grad_kernel, (blocks_c, chunks, cdiv(R, BLOCK_R)), (
                t, v, bits, b, planes, None if b is None else ds_planes, scale if blocks_c == 1 else 1.0, M, C, R, rows,
                *t.stride(), *v.stride(), 0 if bits is None else bits.stride(0), *((0, 0) if b is None else b.stride()),
                stride_g[0], *(stride_g[:0:-1] if transposed else stride_g[1:]), ds_planes.stride(0),
            ), config, BLOCK_R=BLOCK_R,
        )  # fmt: skip
    return _total(planes, dtype, 1.0), _total(ds_planes, t.dtype, scale) if b is not None else ds_planes


def _total(planes: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    if planes.shape[0] == 1:
        return planes[0]
    return sum_planes(planes, planes.new_empty(planes.shape[1:], dtype=dtype), scale)


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank: dB with dS, dB alone (also dA without dropout), and dA with a mask."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        strides = "tm vm bitsm bc gp gc dsp".split()
        types = dict(
            t_ptr=x, v_ptr=x, bits_ptr="*u8", b_ptr="*fp32", g_ptr="*fp32", ds_ptr="*fp32", scale="fp32",
            M="i32", C="i32", R="i32", rows_per_program="i32", **{f"stride_{name}": "i32" for name in (*strides, "gr")},
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            constants = dict(BLOCK_R=BLOCK_R, stride_tc=1, stride_vr=1, stride_br=1)
            db = constants | dict(bits_ptr=None, stride_gr=1)
            yield case(_lora_grad_kernel, "lora_grad", f"r{BLOCK_R}-db-ds", candidate, types, **db)
            yield case(
                _lora_grad_kernel, "lora_grad", f"r{BLOCK_R}-db", candidate, types, b_ptr=None, ds_ptr=None, **db
            )
            da = constants | dict(b_ptr=None, ds_ptr=None, stride_gc=1)
            yield case(_lora_grad_kernel, "lora_grad", f"r{BLOCK_R}-da", candidate, types, **da)
