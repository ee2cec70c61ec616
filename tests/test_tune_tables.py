"""What ``python -m bench tune`` measures is complete and found again, and the committed rows are of it."""

import json
from importlib import import_module, util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the tuner runs kernels")

from bench import aot, tune, tune_choices, tune_jobs
from bench.tune_case import Setting
from csrc_triton.common import tuning

VERSION = ".".join(tuning.triton.__version__.split(".")[:2])
GPU = torch.device("cuda", 0)
PROVENANCE = {"gpu", "torch", "triton", "date", "commit"}


@pytest.fixture(scope="module")
def kernels():
    for module in aot.kernel_modules():
        import_module(module)
    return {kernel: rows for kernel, rows in tuning.CANDIDATES.items() if kernel != "fake"}


def test_every_kernel_with_candidates_has_a_job_and_each_size_a_row_of_its_own(kernels):
    assert set(tune_jobs.JOBS) == set(kernels)
    for kernel, job in tune_jobs.JOBS.items():
        for sizes in (job.sizes, job.tiny):
            keys = {(M, N, K, tuning.block_r(R)) for M, N, K, R in sizes}
            assert len(keys) == len(sizes) > 0, kernel
            assert all(M & (M - 1) == 0 for M, *_ in sizes), "config_for rounds M up to a power of two"


@pytest.mark.parametrize("kernel", sorted(tune_jobs.JOBS))
def test_a_row_is_found_where_it_was_measured(kernels, kernel, monkeypatch):
    """The launchers ask for the sizes of their jobs: real sizes, on tensors without memory, launching nothing."""
    from triton.runtime.jit import KernelInterface

    from csrc_triton.common import launch

    job, meta = tune_jobs.JOBS[kernel], torch.device("meta")
    monkeypatch.setattr(launch, "JITFunction", ())  # launches are Triton's own, which are none
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda self, grid: lambda *args, **kwargs: None)
    on = Setting("Test GPU", meta, torch.bfloat16, "sm_90", 0, 0.0, 1, dry=False)
    for size in job.sizes:
        case = job.case(on, size)
        with tuning.trying(kernel, tuning.default_config(kernel, "sm_90", on.dtype, size[0], 16)) as asked:
            case.run(*case.inputs())
        assert asked == {("bfloat16", *size)}
    rows = [
        dict(kernel=kernel, dtype="bfloat16", M=M, N=N, K=K, R=R, config=i, gpu="Test GPU", triton=VERSION)
        for i, (M, N, K, R) in enumerate(job.sizes)
    ]
    monkeypatch.setattr(tuning, "_table", lambda: rows)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    tuning._lookup.cache_clear()
    found = [tuning._lookup(kernel, GPU, on.dtype, M, N, K, tuning.block_r(R)) for M, N, K, R in job.sizes]
    tuning._lookup.cache_clear()
    assert found == list(range(len(job.sizes)))


def test_every_default_is_offered_on_every_architecture_that_has_the_kernel(kernels):
    for kernel, job in tune_jobs.JOBS.items():
        for arch in tuning.ARCHS:
            if not any(arch in candidate.archs for candidate in kernels[kernel]):
                continue  # its launcher asks for the architecture before it takes the kernel
            on = SimpleNamespace(arch=arch, dtype=torch.bfloat16)
            for size in job.sizes:
                M, *_, R = size
                default = tuning.default_config(kernel, arch, on.dtype, M, tuning.block_r(R))
                assert default in tune._offered(on, kernel, size, job.all_rows), (kernel, arch, size)


def test_where_all_rows_are_one_tile_smaller_tiles_are_not_offered(kernels):
    on = SimpleNamespace(arch="sm_90", dtype=torch.bfloat16)
    for kernel in ("mixed_one_launch", "fourbit_mixed"):
        offered = tune._offered(on, kernel, (64, 4096, 4096, 16), tune_jobs.JOBS[kernel].all_rows)
        assert {config["BLOCK_M"] for config in offered} == {64}


def faults_of(configs, choices, kernels):
    """What is wrong with the rows of the two tables."""
    found = []
    for row in configs:
        rows = kernels.get(row["kernel"], [])
        if row["config"] not in [c.config for c in rows if tuning.block_r(row["R"]) <= c.max_rank]:
            found.append(("not a candidate", row))
    for row in choices:
        if row["implementation"] not in tune_choices.NAMES.get(row["op"], ()):
            found.append(("no implementation of that op", row))
    for row, own in ((row, own) for rows, own in ((configs, "config"), (choices, "implementation")) for row in rows):
        if not all(row.get(name) for name in (*PROVENANCE, "M", "R", own)) or row["gpu"] == tune.INTERPRETER:
            found.append(("provenance", row))
    return found


def test_committed_rows_name_candidates_and_implementations(kernels):
    tables = Path(util.find_spec("csrc_triton").origin).parent / "tables"
    configs, choices = (json.loads((tables / name).read_text()) for name in (tune.CONFIGS, tune.CHOICES))
    assert faults_of(configs, choices, kernels) == []


def test_what_a_committed_row_must_not_be(kernels):
    source = dict(gpu="Test GPU", torch="2.13.0", triton="3.9", date="2026-01-02", commit="abc")
    sizes = dict(dtype="bfloat16", M=1, N=32, K=48, R=16)
    config = dict(kernel="lora_gemm", config=kernels["lora_gemm"][0].config, **sizes, **source)
    named = dict(op="lora_linear", dropout=False, implementation="split", **sizes, **source)
    assert faults_of([config], [named], kernels) == []
    for change in (dict(config=config["config"] | dict(num_warps=16)), dict(kernel="lora"), dict(commit="")):
        assert len(faults_of([config | change], [], kernels)) == 1
    for change in (dict(implementation="grouped"), dict(op="lora"), dict(gpu=tune.INTERPRETER)):
        assert len(faults_of([], [named | change], kernels)) == 1


def test_uses_reach_down_to_what_the_row_below_leaves():
    for made in tune_choices.choices(dry=False):
        M, _, _, R = made.size
        below = 0 if made.smaller is None else made.smaller
        assert tune_choices._lowest(made.size, made.smaller)[0] == below + 1 <= M and R in (1, *tune_jobs.RANKS)
        assert set(made.names) <= set(tune_choices.NAMES[made.op]) and made.names[0] in ("torch", "addmm", "grouped")
