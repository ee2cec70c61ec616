"""Launching a kernel: as ``kernel[grid](...)``, without what Triton does again for every launch of the same kind.

Triton looks at each argument of each launch to find the compiled kernel: 20 us of Python for 20 arguments. What the
compiled kernel depends on is little, and ``launch`` remembers it: the dtype and the alignment of pointers, whether an
integer is 1 or a multiple of 16, the constants. A launch of a kind that was made before goes straight to the driver.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# called with the kernel of every launch, for tests
LISTENERS: list[Callable[[Any], None]] = []
_OPTIONS = ("num_warps", "num_stages")
_INT32_END = 1 << 31


class _Prepared(NamedTuple):
    """A compiled kernel, and what follows the arguments in a launch of it."""

    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]


_prepared: dict[tuple[Any, ...], _Prepared] = {}
_compiling: list[object] = []  # see compile_only


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], config: Mapping[str, int], **constants: Any
) -> None:
    """Launch ``kernel`` on the device of args[0] and the current stream.

    Args:
        args: all arguments that are no constants, in the kernel's order: tensors, None, integers, floats.
        config: of ``config_for``; entries that are neither arguments of the kernel nor options are for its launcher.
        constants: the other constants, by name.
    Raises: RuntimeError when the kernel would be loaded inside the capture of a CUDA graph.
    """
    for listen in LISTENERS:
        listen(kernel)
    if not isinstance(kernel, JITFunction):  # the interpreter
        kernel[grid](*args, **_of_kernel(kernel, config), **constants)
        return
    index = args[0].device.index
    if index is not None and index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            launch(kernel, grid, args, config, **constants)
        return
    key = (id(kernel), index, *config.values(), *constants.values(), *[_kind(arg) for arg in args])
    prepared = _prepared.get(key)
    if prepared is None:
        if _compiling:
            kernel.run(*args, grid=grid, warmup=True, **_of_kernel(kernel, config), **constants)
            return
        prepared = _prepared[key] = _prepare(kernel, grid, args, {**_of_kernel(kernel, config), **constants})
    if knobs.runtime.launch_enter_hook.calls:  # a profiler, which wants to know more
        kernel[grid](*args, **_of_kernel(kernel, config), **constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(index or 0)
    prepared.run(x, y, z, stream, prepared.function, prepared.metadata, None, None, None, *args, *prepared.constants)


@contextmanager
def compile_only(threads: int) -> Iterator[None]:
    """Inside, kernels that were never launched are compiled, several at a time, and not launched; at the end all are
    there. For the tuner: what such calls return holds no results. A kernel that does not compile says so when launched.
    """
    from triton.runtime._async_compile import AsyncCompileMode

    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        _compiling.append(pool)
        try:
            yield
        finally:
            _compiling.pop()


def launch_by_name(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Mapping[str, int]) -> None:
    """``launch`` for kernels that share most of their many arguments: each takes those of ``arguments`` that it has.

    arguments: all that are not in config, constants too, by name; those of other kernels are left alone.
    """
    names, constants = _names_of(kernel)
    args = tuple([arguments[name] for name in names])
    launch(kernel, grid, args, config, **{name: arguments[name] for name in constants if name in arguments})


@functools.cache
def _names_of(kernel: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a kernel's arguments, and of its constants, which come after them."""
    annotations = kernel.fn.__annotations__
    constants = tuple(name for name in kernel.arg_names if "constexpr" in str(annotations.get(name)))
    return tuple(name for name in kernel.arg_names if name not in constants), constants


def _kind(arg: Any) -> Any:
    """What Triton may specialise on: arguments of one kind run one compiled kernel."""
    if type(arg) is int:
        return 1 if arg == 1 else (arg & 15 == 0, arg < _INT32_END)
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() & 15 == 0
    return arg is None


def _of_kernel(kernel: Any, config: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in config.items() if name in _OPTIONS or name in kernel.arg_names}


def _prepare(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> _Prepared:
    compiled = kernel.run(*args, grid=grid, warmup=True, **constants)  # compiles, and launches nothing
    if compiled.module is None and args[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.fn.__name__} is not loaded yet, and a CUDA graph is being captured: run the same call once "
            "before the capture"
        )
    names = kernel.arg_names[len(args) :]
    run = compiled.run  # loads it
    return _Prepared(run, compiled.function, compiled.packed_metadata, tuple(constants[name] for name in names))
