"""Which kernels are measured to choose their configurations, and at which sizes: ``jobs(shapes)``, as data.

A size is (M, N, K, R) as the kernel's launcher asks for it, 0 where it has no such size; heads are R = D. The tuner
writes rows under what the launcher did ask, and refuses to if that is another size. To add a kernel: a job with its
sizes and a case, which is inputs, call and formula.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from ..ops.operators import MIXED_ONE_LAUNCH_MAX_M, ONE_LAUNCH_MAX_MR, ONE_LAUNCH_MAX_RANK
from . import lora, mixed, prefix, quant
from .case import Case, Setting, Size
from .shapes import Shapes, rank_bucket

_SLOTS = (32, 128, 512)  # of all prefixes of a call
_DECODED_TOKENS = (1, 4, 16)  # of a row
_DECODED_ROWS = 16  # of csrc_triton/quantized/fourbit_decode.py
_INT8_FEW_ROWS = 512  # FEW_ROWS of csrc_triton/quantized/int8_quantize.py


@dataclass(frozen=True)
class Job:
    """A kernel, its sizes, and what makes the case of a size.

    all_rows: BLOCK_M of a configuration has to hold all M rows.
    """

    kernel: str
    case: Callable[[Setting, Size], Case]
    sizes: list[Size]
    all_rows: bool = False


def jobs(shapes: Shapes) -> list[Job]:
    """All that is worth a row for these shapes; M ascends for one (N, K, R): a row speaks for what is smaller."""
    found = [*_lora(shapes), *_quantized(shapes), *_prefix(shapes)]
    return [job for job in found if job.sizes]


def _lora(shapes: Shapes) -> list[Job]:
    plain, tokens, trained = shapes.plain, shapes.tokens, shapes.trained
    adapted = (*plain, *shapes.four_bit, *shapes.int8)  # their adapters are the same
    few = [M for M in tokens if M <= MIXED_ONE_LAUNCH_MAX_M]
    inputs, outputs = [(0, K, R) for _, K, R in adapted], [(N, 0, R) for N, _, R in adapted]
    # the backward's: of dY and dX
    inputs_of_dy, outputs_of_dx = [(0, N, R) for N, _, R in adapted], [(K, 0, R) for _, K, R in adapted]
    turned = [(K, N, R) for N, K, R in plain]
    one_launch = [size for size in _sizes(tokens, _small(plain)) if size[0] * size[3] <= ONE_LAUNCH_MAX_MR]
    return [
        Job("lora_shrink", lora.lora_shrink, _sizes(tokens, inputs)),
        Job("lora_shrink", partial(lora.lora_shrink, turned=True), _sizes(trained, inputs_of_dy, inputs)),
        Job("lora_expand", lora.lora_expand, _sizes(tokens, outputs)),
        Job("lora_expand", partial(lora.lora_expand, turned=True), _sizes(trained, outputs_of_dx, outputs)),
        Job("lora_gemm", lora.lora_gemm, _sizes(tokens, plain)),
        Job("lora_gemm", partial(lora.lora_gemm, turned=True), _sizes(trained, turned, plain)),
        Job("lora_one_launch", lora.lora_one_launch, one_launch),
        Job("lora_grad", lora.lora_grad, _sizes(trained, [(C, 0, R) for N, K, R in adapted for C in (N, K)])),
        Job("mixed_shrink", mixed.mixed_shrink, _sizes(tokens, inputs)),
        Job("mixed_expand", mixed.mixed_expand, _sizes(tokens, outputs)),
        Job("mixed_gemm", mixed.mixed_gemm, _sizes(tokens, plain)),
        Job("mixed_one_launch", mixed.mixed_one_launch, _sizes(few, _small(plain)), all_rows=True),
    ]  # fmt: skip


def _quantized(shapes: Shapes) -> list[Job]:
    four_bit, int8, tokens = shapes.four_bit, shapes.int8, shapes.tokens
    quantized = [(0, K, R) for _, K, R in int8]
    few = [M for M in tokens if M <= MIXED_ONE_LAUNCH_MAX_M]
    return [
        Job("fourbit", quant.fourbit, _sizes((1,), [(N, K, 1) for N, K, _ in four_bit])),
        Job("fourbit_linear", quant.fourbit_linear, _sizes(few, _small(four_bit))),
        Job("fourbit_decode", quant.fourbit_decode, _sizes([M for M in few if M <= _DECODED_ROWS], _small(four_bit))),
        Job("fourbit_mixed", quant.fourbit_mixed, _sizes(few, _small(four_bit)), all_rows=True),
        Job("int8_quantize", quant.int8_quantize, _sizes([M for M in tokens if M >= _INT8_FEW_ROWS], quantized)),
        Job("int8_quantize_rows", quant.int8_quantize, _sizes([M for M in tokens if M < _INT8_FEW_ROWS], quantized)),
        Job("int8_gemm", quant.int8_gemm, _sizes(tokens, int8)),
    ]


def _prefix(shapes: Shapes) -> list[Job]:
    heads = [(0, 0, D) for D in shapes.head_sizes]
    queries = sorted({*shapes.trained, *(M for M in shapes.tokens if M > 16)})
    group = shapes.heads[0] // shapes.heads[1]
    return [
        Job("prefix_fwd", prefix.prefix_fwd, _sizes(queries, heads)),
        Job("prefix_decode", prefix.prefix_decode, _sizes([group * L for L in _DECODED_TOKENS], heads)),
        Job("prefix_dq", prefix.prefix_dq, _sizes(shapes.trained, heads)),
        Job("prefix_dkv", prefix.prefix_dkv, _sizes(shapes.trained, heads)),
        Job("prefix_dprefix", prefix.prefix_dprefix, _sizes(_SLOTS if shapes.trained else (), heads)),
    ]


def _small(sites: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return [site for site in sites if site[2] <= ONE_LAUNCH_MAX_RANK]


def _sizes(
    tokens: Iterable[int], sites: Iterable[tuple[int, int, int]], but: Iterable[tuple[int, int, int]] = ()
) -> list[Size]:
    """Each once, but those of other sites: ranks that kernels round up to the same are the same."""
    others = {(N, K, rank_bucket(R)) for N, K, R in but}
    found: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    for N, K, R in sites:
        if (N, K, rank_bucket(R)) not in others:
            found.setdefault((N, K, rank_bucket(R)), (N, K, R))
    return [(M, N, K, R) for N, K, R in found.values() for M in tokens]
