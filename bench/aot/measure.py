"""Compile one kernel for a GPU that need not be there, and read what the machine code says about it.

NVIDIA: the log of Triton's own ptxas call gives the spills of exactly the binary that would run; cuobjdump (bundled
with Triton) gives registers, stack and instructions. AMD: the assembler text carries all of it as metadata.
"""

import contextlib
import hashlib
import io
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Chip:
    """What one architecture allows a thread block to use."""

    target: GPUTarget
    shared_bytes: int  # by one block
    register_file: int  # 32-bit registers of one multiprocessor


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, 64 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 64 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 64 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 128 * 1024),
}
_NVIDIA_MMA = re.compile(r"\b(?:[A-Z]{1,2}MMA|HGMMA|IGMMA|QGMMA|BGMMA|UTC[A-Z]*MMA)\b(?!\w)")
_AMD_MMA = re.compile(r"^\s+v_s?mfma", re.MULTILINE)
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+.*;", re.MULTILINE)
_AMD_LINE = re.compile(r"^\s+[a-z]+_[a-z0-9_]+", re.MULTILINE)


def compile_and_measure(case: Any, arch: str) -> dict[str, Any]:
    """Compile ``case`` for ``arch``; return all of a row but its identity, with threads per block and a note."""
    chip = CHIPS[arch]
    source = ASTSource(
        fn=case.kernel,
        signature=_signature(case),
        constexprs=dict(case.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in specialized(case)},
    )
    log = io.StringIO()
    with _fresh_compile(), contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=chip.target, options=dict(case.options))
    if chip.target.backend == "cuda":
        return _read_nvidia(compiled, log.getvalue())
    return _read_amd(compiled)


def source_hash(kernel: JITFunction) -> str:
    """Hash the kernel's text, that of the jit functions it calls and the constants it names, wherever they stand."""
    texts: dict[str, str] = {}
    _collect(kernel, texts)
    return hashlib.sha256("\n".join(f"{k}\n{texts[k]}" for k in sorted(texts)).encode()).hexdigest()


def _collect(function: JITFunction, texts: dict[str, str]) -> None:
    name = function.fn.__qualname__
    if name in texts:
        return
    texts[name] = function.src
    scope = function.fn.__globals__
    for dotted in set(re.findall(r"[A-Za-z_][A-Za-z0-9_.]*", function.src)):
        value = _lookup(scope, dotted.split("."))
        if isinstance(value, JITFunction):
            if not value.fn.__module__.startswith("triton."):
                _collect(value, texts)
        elif isinstance(value, (bool, int, float, str, triton.language.constexpr)):
            texts[f"{name}: {dotted}"] = repr(value)


def _lookup(scope: dict[str, Any], path: list[str]) -> Any:
    value = scope.get(path[0])
    for part in path[1:]:
        value = getattr(value, part, None)
    return value


@contextlib.contextmanager
def _fresh_compile() -> Any:
    """Never a cached binary (it has no log), and the cache of the user stays as it is."""
    names = ("TRITON_CACHE_DIR", "TRITON_DUMP_PTXAS_LOG", "TRITON_DEFAULT_FP_FUSION", "TRITON_ALWAYS_COMPILE")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        # fusion of multiply and add is what a launch gets by default up to 3.9; its default flips in 3.10
        os.environ.update(zip(names, (folder, "1", "1", "1"), strict=True))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _signature(case: Any) -> dict[str, str]:
    return {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}


def specialized(case: Any) -> list[int]:
    """The places of the arguments that are compiled as multiples of 16, as in every model a launch finds them to be:
    pointers, and integers but those that the kernel does not specialize on."""
    never = case.kernel.do_not_specialize
    return [
        i
        for i, (name, kind) in enumerate(_signature(case).items())
        if kind.startswith("*") or (kind in ("i32", "i64") and name not in never)
    ]


def _read_nvidia(compiled: Any, log: str) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(
        int, _only(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text, "cuobjdump").groups()
    )
    spills = _only(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log, "ptxas")
    threads = _only(r"\.(?:reqntid|maxntid) (\d+)", compiled.asm["ptx"], "ptx")
    return {
        "registers": registers,
        "spill_bytes": max(stack, local, *map(int, spills.groups())),
        "shared_bytes": compiled.metadata.shared,
        "mma_count": len(_NVIDIA_MMA.findall(text)),
        "sass_lines": len(_SASS_LINE.findall(text)),
        "threads": int(threads[1]),
        "note": "wgmma serialized" if "wgmma" in log and "serializ" in log else "",
    }


def _read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    threads = _only(r"\.max_flat_workgroup_size:\s+(\d+)", text, "amdgcn")
    vector_spills = int(_only(r"\.vgpr_spill_count:\s+(\d+)", text, "amdgcn")[1])
    scratch = int(_only(r"\.private_segment_fixed_size:\s+(\d+)", text, "amdgcn")[1])
    return {
        "registers": int(_only(r"\.vgpr_count:\s+(\d+)", text, "amdgcn")[1]),
        "spill_bytes": max(4 * vector_spills, scratch),
        "shared_bytes": compiled.metadata.shared,
        "mma_count": len(_AMD_MMA.findall(text)),
        "sass_lines": len(_AMD_LINE.findall(text)),
        "threads": int(threads[1]),
        "note": "",
    }


def _only(pattern: str, text: str, where: str) -> re.Match[str]:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"{where}: nothing matches {pattern!r}; the tool's output has changed:\n{text[-500:]}")
    return match
