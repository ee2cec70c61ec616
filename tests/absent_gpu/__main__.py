"""Compile every launch of ``calls.py`` for a GPU that is not there: ``python tests/absent_gpu ARCH FAMILY [--update]``.

Prints JSON: the calls made, the kernels they need, how many were compiled now, and what failed. What was compiled
without a complaint is kept in rows.json, by the hash of all that decides it, and is not compiled again; --update adds
to that file.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = HERE / "rows.json"
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

# shared memory that a block may have
CHIPS = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", choices=CHIPS)
    parser.add_argument("family", choices=("lora", "mixed", "prefix", "quantized"))
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of launches up to 3.9
    os.environ.pop("TRITON_INTERPRET", None)

    import absent_driver
    import calls

    from csrc_triton.common import tuning

    shared = CHIPS[args.arch] * 1024
    launched = absent_driver.install(int(args.arch[3:]), shared)
    tuning.arch_of = lambda device: args.arch if args.arch in tuning.ARCHS else "gfx942"
    known = set(json.loads(ROWS.read_text())) if ROWS.exists() else set()
    rows = _Rows(known, args.arch, shared)
    rows.watch()
    failed, made = {}, 0
    for label, call in calls.every(args.family, wide=args.arch == "sm_90"):
        made += 1
        try:
            call()
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {str(error)[:300]}"
    summary = dict(calls=made, launches=len(launched), kernels=len(rows.met), compiled=len(rows.met - known))
    print(json.dumps(summary | dict(failed=failed)))
    if args.update:
        ROWS.write_text(json.dumps(sorted(known | rows.clean), indent=0) + "\n")
    return bool(failed)


class _Rows:
    """What was compiled: a kernel that is known is replaced by nothing at all, which is what a launch here does."""

    def __init__(self, known: set[str], arch: str, shared: int) -> None:
        self.known, self.arch, self.shared = known, arch, shared
        self.met: set[str] = set()
        self.clean: set[str] = set()

    def watch(self) -> None:
        from triton.runtime.jit import JITFunction

        compile_it = JITFunction._do_compile

        def do_compile(
            kernel: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, *rest: Any
        ) -> Any:  # fmt: skip
            row = self.key(kernel, signature, constexprs, options, rest[0])
            self.met.add(row)
            if row in self.known:
                compiled: Any = _Nothing()
                kernel.device_caches[device][0][key] = compiled
                return compiled
            compiled = compile_it(kernel, key, signature, device, constexprs, options, *rest)
            if compiled.metadata.shared > self.shared:
                raise RuntimeError(f"{compiled.metadata.shared} bytes of shared memory, {self.shared} are there")
            self.clean.add(row)
            return compiled

        JITFunction._do_compile = do_compile

    def key(self, kernel: Any, signature: Any, constexprs: Any, options: Any, attributes: Any) -> str:
        import triton

        from bench.aot.measure import source_hash

        constants = {str(k): source_hash(v) if hasattr(v, "src") else repr(v) for k, v in constexprs.items()}
        settings = (options.num_warps, options.num_stages, options.enable_fp_fusion)
        parts = (source_hash(kernel), signature, constants, settings, sorted(map(repr, attributes.items())))
        text = repr((parts, triton.__version__, self.arch))
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class _Nothing:
    module = function = packed_metadata = 1

    def run(self, *args: Any) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
