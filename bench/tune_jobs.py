"""What ``python -m bench tune`` runs to choose configurations: for every kernel the sizes of its table, as data.

A size is (M, N, K, R) as the kernel's launcher asks for it, 0 where it has no such size; heads are R = D. The tuner
writes rows under what the launcher did ask, and refuses to if that is another size. Sizes are Llama-3-8B's. A rank of 8
is not here: kernels round it up to 16, and so does the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_fast.ops.choice import ONE_LAUNCH_MAX_MR

from . import tune_lora, tune_mixed, tune_prefix, tune_quant
from .tune_case import SITES, Case, Setting, Size

MS = (1, 16, 64, 256, 1024, 2048, 8192)
TRAINED = tuple(M for M in MS if M >= 256)  # rows of a training step
INT8_FEW_ROWS = 512  # FEW_ROWS of csrc_triton/quantized/int8_quantize.py
FEW = tuple(M for M in MS if M <= 64)
RANKS = (16, 64)
QUANT_SITES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # (N, K) of q, k, up, down, one by one
HEAD_SIZES = (128, 64)
QUERIES = (256, 1024, 2048)  # of a row, with as many keys
SLOTS = (32, 128, 512)  # of all prefixes of a call
DECODED = (4, 16, 64)  # queries of a row that share a key head: 1, 4 and 16 tokens with 4 query heads

_N, _K = ({site[i] for site in SITES} for i in (0, 1))
_QUANT_K = {K for _, K in QUANT_SITES}
_TURNED = [(K, N) for N, K in SITES if (K, N) not in SITES]  # of dX


@dataclass(frozen=True)
class Job:
    """A kernel's sizes, those of a dry run, and what makes the case of a size.

    all_rows: BLOCK_M of a configuration has to hold all M rows.
    """

    case: Callable[[Setting, Size], Case]
    sizes: list[Size]
    tiny: list[Size]
    all_rows: bool = False


def _sizes(ms: tuple[int, ...], sites: Any, ranks: tuple[int, ...] = RANKS) -> list[Size]:
    """M ascends for one (N, K, R): a row speaks for what is smaller."""
    return [(M, N, K, R) for N, K in sites for R in ranks for M in ms]


JOBS = {
    "lora_shrink": Job(
        tune_lora.lora_shrink,
        # x @ a.T, then dY @ b
        [*_sizes(MS, [(0, K) for K in sorted(_K)]), *_sizes(TRAINED, [(0, N) for N in sorted(_N - _K)])],
        [(8, 0, 48, 16)],
    ),
    "lora_expand": Job(
        tune_lora.lora_expand,
        [*_sizes(MS, [(N, 0) for N in sorted(_N)]), *_sizes(TRAINED, [(K, 0) for K in sorted(_K - _N)])],
        [(8, 40, 0, 16)],
    ),
    "lora_gemm": Job(
        tune_lora.lora_gemm, [*_sizes(MS, SITES), *_sizes(TRAINED, _TURNED)], [(8, 40, 48, 16), (16, 40, 48, 16)]
    ),
    "lora_one_launch": Job(
        tune_lora.lora_one_launch,
        [size for size in _sizes(MS, SITES) if size[0] * size[3] <= ONE_LAUNCH_MAX_MR],
        [(8, 40, 48, 16)],
    ),
    "lora_grad": Job(tune_lora.lora_grad, _sizes(TRAINED, [(C, 0) for C in sorted(_N | _K)]), [(32, 40, 0, 16)]),
    "mixed_shrink": Job(tune_mixed.mixed_shrink, _sizes(MS, [(0, K) for K in sorted(_K)]), [(8, 0, 48, 16)]),
    "mixed_expand": Job(tune_mixed.mixed_expand, _sizes(MS, [(N, 0) for N in sorted(_N)]), [(8, 40, 0, 16)]),
    "mixed_gemm": Job(tune_mixed.mixed_gemm, _sizes(MS, SITES), [(8, 40, 48, 16)]),
    "mixed_one_launch": Job(tune_mixed.mixed_one_launch, _sizes(FEW, SITES), [(8, 40, 48, 16)], all_rows=True),
    "fourbit": Job(tune_quant.fourbit, _sizes((1,), QUANT_SITES, (1,)), [(1, 40, 64, 1)]),
    "fourbit_linear": Job(tune_quant.fourbit_linear, _sizes(FEW, QUANT_SITES), [(4, 40, 64, 16)]),
    "fourbit_decode": Job(tune_quant.fourbit_decode, _sizes((1, 16), QUANT_SITES), [(4, 40, 64, 16)]),
    "fourbit_mixed": Job(tune_quant.fourbit_mixed, _sizes(FEW, QUANT_SITES), [(4, 40, 64, 16)], all_rows=True),
    "int8_quantize": Job(
        tune_quant.int8_quantize,
        _sizes(tuple(M for M in MS if M >= INT8_FEW_ROWS), [(0, K) for K in sorted(_QUANT_K)]),
        [(INT8_FEW_ROWS, 0, 48, 16)],
    ),
    "int8_quantize_rows": Job(
        tune_quant.int8_quantize,
        _sizes(tuple(M for M in MS if M < INT8_FEW_ROWS), [(0, K) for K in sorted(_QUANT_K)]),
        [(8, 0, 48, 16)],
    ),
    "int8_gemm": Job(tune_quant.int8_gemm, _sizes(MS, QUANT_SITES), [(8, 40, 48, 16)]),
    "prefix_fwd": Job(tune_prefix.prefix_fwd, _sizes(QUERIES, [(0, 0)], HEAD_SIZES), [(64, 0, 0, 16)]),
    "prefix_decode": Job(tune_prefix.prefix_decode, _sizes(DECODED, [(0, 0)], HEAD_SIZES), [(4, 0, 0, 16)]),
    "prefix_dq": Job(tune_prefix.prefix_dq, _sizes(QUERIES, [(0, 0)], HEAD_SIZES), [(64, 0, 0, 16)]),
    "prefix_dkv": Job(tune_prefix.prefix_dkv, _sizes(QUERIES, [(0, 0)], HEAD_SIZES), [(64, 0, 0, 16)]),
    "prefix_dprefix": Job(tune_prefix.prefix_dprefix, _sizes(SLOTS, [(0, 0)], HEAD_SIZES), [(16, 0, 0, 16)]),
}
