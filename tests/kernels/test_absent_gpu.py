"""Every launcher at the kinds of sizes that models have, compiled for GPUs that are not here (tests/absent_gpu)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from absent_driver import run

HERE = Path(__file__).parents[1]
FAMILIES = ("lora", "mixed", "prefix", "quantized")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "sm_89", "sm_100", "sm_120"])
def test_every_launch_compiles(arch: str, family: str) -> None:
    """Where nothing changed since tests/absent_gpu/rows.json was made nothing is compiled, and all is launched."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(HERE / "absent_gpu"), arch, family]
    program = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert program.stdout, program.stderr[-2000:]
    summary = json.loads(program.stdout.splitlines()[-1])
    assert summary["failed"] == {}
    assert summary["calls"] >= 6 and summary["kernels"] >= 6


DECODING = """
import json
import torch
from absent_driver import install
install()
from csrc_triton.prefix import attention, decode
from csrc_triton.prefix.attention import prefix_attention_fwd

q, prefix = torch.zeros(2, 8, 1, 64, dtype=torch.bfloat16), torch.zeros(20, 2, 64, dtype=torch.bfloat16)
cache = torch.zeros(2, 2, 1101, 64, dtype=torch.bfloat16)
for S in range(101, 1102):
    # a cache that grows is a new tensor at each token
    k = cache.flatten()[: 2 * 2 * S * 64].view(2, 2, S, 64)
    options = (None, None, None, 20, None, None, None, None, None, 0.125, S - 1, None, 0.0, 0.0)
    prefix_attention_fwd(q, k, k, prefix, prefix, *options)
kernels = (decode._prefix_decode_kernel, decode._prefix_merge_kernel)
print(json.dumps([len(kernel.device_caches[0][0]) for kernel in kernels]))
"""

PREFILLS = """
import json
import torch
from absent_driver import install
install()
from csrc_triton.common.planes import _sum_planes_kernel
from csrc_triton.lora.gemm import _lora_gemm_kernel
from csrc_triton.lora.linear import lora_linear_fwd
from csrc_triton.lora.shrink import _lora_shrink_kernel

w, a, b = (torch.zeros(s, dtype=torch.bfloat16) for s in ((256, 4096), (16, 4096), (256, 16)))
for M in range(1, 16):
    lora_linear_fwd(torch.zeros(M, 4096, dtype=torch.bfloat16), w, None, a, b, 2.0, 0.0, None, "split")
kernels = (_lora_shrink_kernel, _lora_gemm_kernel)
print(json.dumps([len(kernel.device_caches[0][0]) for kernel in kernels]))
"""

MIXED = """
import json
import torch
from absent_driver import install
install()
from csrc_triton.mixed.expand import _mixed_expand_kernel
from csrc_triton.mixed.gemm import _mixed_gemm_kernel
from csrc_triton.mixed.linear import lora_linear_mixed
from csrc_triton.mixed.shrink import _mixed_shrink_kernel
from peft_fast.ops.mixed_plan import mixed_plan

addresses, ranks, scales = torch.zeros(8, 2, dtype=torch.int64), torch.zeros(8, dtype=torch.int32), torch.zeros(8)
w = torch.zeros(256, 4096, dtype=torch.bfloat16)
for M in range(1, 17):
    x, plan = torch.zeros(M, 4096, dtype=torch.bfloat16), mixed_plan(torch.zeros(M, dtype=torch.int32), 8, 1)
    for how in ("grouped", "split"):
        lora_linear_mixed(x, w, None, addresses, ranks, scales, torch.bfloat16, 16, 0, *plan, how)
kernels = (_mixed_shrink_kernel, _mixed_expand_kernel, _mixed_gemm_kernel)
print(json.dumps([len(kernel.device_caches[0][0]) for kernel in kernels]))
"""


def test_a_generation_of_a_thousand_tokens_compiles_a_kernel_once(tmp_path: Path) -> None:
    assert json.loads(run(DECODING, TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1]) == [1, 1]


def test_the_number_of_rows_compiles_nothing_anew(tmp_path: Path) -> None:
    assert json.loads(run(PREFILLS, TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1]) == [1, 1]


def test_the_number_of_rows_of_a_mixed_batch_compiles_nothing_anew(tmp_path: Path) -> None:
    assert json.loads(run(MIXED, TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1]) == [1, 1, 1]
