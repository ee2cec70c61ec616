"""What ``python -m bench tune`` measures is complete and found again, and the committed rows are of it."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the tuner runs kernels")

from bench import tune
from bench.aot import command as aot
from csrc_triton import tables
from csrc_triton.common import tuning
from peft_fast.tuning import measure, operators
from peft_fast.tuning.case import Setting
from peft_fast.tuning.kernels import jobs
from peft_fast.tuning.shapes import LLAMA_8B, TINY

GPU = torch.device("cuda", 0)
PROVENANCE = {"arch", "gpu", "torch", "triton", "date", "commit"}
JOBS = jobs(LLAMA_8B)
KERNELS = sorted({job.kernel for job in JOBS})


@pytest.fixture(scope="module")
def kernels():
    for module in aot.kernel_modules():
        import_module(module)
    return {kernel: rows for kernel, rows in tuning.CANDIDATES.items() if kernel != "fake"}


def test_every_kernel_with_candidates_has_a_job_and_each_size_a_row_of_its_own(kernels):
    for shapes in (LLAMA_8B, TINY):
        found = jobs(shapes)
        assert {job.kernel for job in found} == set(kernels) - ({"int8_quantize"} if shapes is TINY else set())
        for kernel in {job.kernel for job in found}:
            sizes = [size for job in found if job.kernel == kernel for size in job.sizes]
            keys = {(M, N, K, tuning.block_r(R)) for M, N, K, R in sizes}
            assert len(keys) == len(sizes) > 0, kernel
            assert all(M & (M - 1) == 0 for M, *_ in sizes), "config_for rounds M up to a power of two"


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_is_found_where_it_was_measured(kernels, kernel, monkeypatch):
    """The launchers ask for the sizes of their jobs: real sizes, on tensors without memory, launching nothing."""
    from triton.runtime.jit import KernelInterface

    from csrc_triton.common import launch

    meta, sizes = torch.device("meta"), []
    monkeypatch.setattr(launch, "JITFunction", ())  # launches are Triton's own, which are none
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda self, grid: lambda *args, **kwargs: None)
    on = Setting("Test GPU", meta, torch.bfloat16, "sm_90", 0, 0.0, 1, dry=False)
    for job in JOBS:
        for size in job.sizes if job.kernel == kernel else ():
            case = job.case(on, size)
            with tuning.trying(kernel, tuning.default_config(kernel, "sm_90", on.dtype, size[0], 16)) as asked:
                case.run(*case.inputs())
            assert asked == {("bfloat16", *size)}
            sizes.append(size)
    rows = [
        dict(
            kernel=kernel, dtype="bfloat16", M=M, N=N, K=K, R=R, config=dict(i=i), gpu="Test GPU", arch="sm_90", gain=2
        )
        for i, (M, N, K, R) in enumerate(sizes)
    ]
    candidates = [SimpleNamespace(config=row["config"], max_rank=1 << 20) for row in rows]
    monkeypatch.setattr(tuning, "candidates_for", lambda *key: candidates)
    monkeypatch.setattr(tables, "read", lambda path: rows if path.parent == tables.SHIPPED else ())
    monkeypatch.setattr(tables, "gpu_of", lambda device: tables.Gpu("sm_90", "Test GPU"))
    monkeypatch.setattr(tuning, "arch_of", lambda device: "sm_90")
    tuning._lookup.cache_clear()
    found = [tuning._lookup(kernel, GPU, on.dtype, M, N, K, tuning.block_r(R))["i"] for M, N, K, R in sizes]
    tuning._lookup.cache_clear()
    assert found == list(range(len(sizes)))


def test_every_default_is_offered_on_every_architecture_that_has_the_kernel(kernels):
    for job in JOBS:
        for arch in tuning.ARCHS:
            if not any(arch in candidate.archs for candidate in kernels[job.kernel]):
                continue  # its launcher asks for the architecture before it takes the kernel
            on = SimpleNamespace(arch=arch, dtype=torch.bfloat16, dry=False)
            for size in job.sizes:
                M, *_, R = size
                candidates = [c for c in kernels[job.kernel] if arch in c.archs and tuning.block_r(R) <= c.max_rank]
                fitting = [c.config for c in candidates if not job.all_rows or c.blocks["BLOCK_M"] >= M]
                default = tuning.default_config(job.kernel, arch, on.dtype, M, tuning.block_r(R))
                assert default in fitting, (job.kernel, arch, size)
                offered = measure.offered_configs(on, job, size)
                assert offered[0] == default and all(config in fitting for config in offered)


def test_where_all_rows_are_one_tile_smaller_tiles_are_not_offered(kernels):
    on = SimpleNamespace(arch="sm_90", dtype=torch.bfloat16, dry=False)
    for kernel in ("mixed_one_launch", "fourbit_mixed"):
        job = next(job for job in JOBS if job.kernel == kernel)
        offered = measure.offered_configs(on, job, (64, 4096, 4096, 16))
        assert {config["BLOCK_M"] for config in offered} == {64}


def faults_of(configs, choices, kernels):
    """What is wrong with the rows of the two tables."""
    found = []
    for row in configs:
        rows = kernels.get(row["kernel"], [])
        if row["config"] not in [c.config for c in rows if tuning.block_r(row["R"]) <= c.max_rank]:
            found.append(("not a candidate", row))
    for row in choices:
        if row["implementation"] not in operators.NAMES.get(row["op"], ()):
            found.append(("no implementation of that op", row))
    for row, own in ((row, own) for rows, own in ((configs, "config"), (choices, "implementation")) for row in rows):
        if not all(row.get(name) for name in (*PROVENANCE, "M", "R", own)) or row["gpu"] == tune.INTERPRETER:
            found.append(("provenance", row))
    return found


def test_committed_rows_name_candidates_and_implementations(kernels):
    configs, choices = (json.loads((tables.SHIPPED / name).read_text()) for name in tune.FILES.values())
    assert faults_of(configs, choices, kernels) == []


def test_what_a_committed_row_must_not_be(kernels):
    source = dict(arch="sm_90", gpu="Test GPU", torch="2.13.0", triton="3.9", date="2026-01-02", commit="abc")
    sizes = dict(dtype="bfloat16", M=1, N=32, K=48, R=16)
    config = dict(kernel="lora_gemm", config=kernels["lora_gemm"][0].config, **sizes, **source)
    named = dict(op="lora_linear", dropout=False, implementation="split", **sizes, **source)
    assert faults_of([config], [named], kernels) == []
    for change in (dict(config=config["config"] | dict(num_warps=16)), dict(kernel="lora"), dict(commit="")):
        assert len(faults_of([config | change], [], kernels)) == 1
    for change in (dict(implementation="grouped"), dict(op="lora"), dict(gpu=tune.INTERPRETER)):
        assert len(faults_of([], [named | change], kernels)) == 1


def test_uses_reach_down_to_what_the_row_below_leaves():
    for made in operators.choices(LLAMA_8B):
        M, _, _, R = made.size
        below = 0 if made.smaller is None else made.smaller
        assert operators._lowest(made.size, made.smaller)[0] == below + 1 <= M and R in (1, 16, 64)
        assert set(made.names) <= set(operators.NAMES[made.op]) and made.names[0] in ("torch", "addmm", "grouped")
