"""csrc_triton.common.launch: the same compiled kernels as Triton's own launches, found without Triton."""

import json

import pytest

pytest.importorskip("triton")
from absent_driver import run

# Triton wants a kernel's text in a file
KERNEL = '''
import triton.language as tl

def _add_kernel(x_ptr, y_ptr, scale, n, stride, BLOCK: tl.constexpr):
    """y = scale * x."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < n, other=0.0)
    if y_ptr is not None:
        tl.store(y_ptr + offs, x * scale, mask=offs < n)
'''


def program(tmp_path, body, **options):
    (tmp_path / "add_kernel.py").write_text(KERNEL)
    lines = f"""
import json, sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, triton
from absent_driver import install
launched = install()
from add_kernel import _add_kernel
from csrc_triton.common import launch as module
from csrc_triton.common.launch import launch

kernel = triton.jit(do_not_specialize={options.get("unspecialized", [])!r})(_add_kernel)
asked = []
real = kernel.run
kernel.run = lambda *args, **kwargs: asked.append(kwargs.get("warmup")) or real(*args, **kwargs)
x, y = torch.zeros(4096), torch.zeros(4096)
config = dict(BLOCK=16, LARGEST_R=64, num_warps=4, num_stages=2)
def compiled():
    return len(kernel.device_caches[0][0])
{body}
"""
    return json.loads(run(lines, TRITON_CACHE_DIR=str(tmp_path / "cache")).splitlines()[-1])


def test_a_second_launch_does_not_ask_triton(tmp_path):
    body = """
for scale in (1.0, 2.0, 0.5):
    launch(kernel, (3,), (x, y, scale, 100, 32), config)
print(json.dumps([asked, launched, compiled()]))
"""
    asked, launched, compiled = program(tmp_path, body)
    assert asked == [True] and launched == ["_add_kernel"] * 3 and compiled == 1


def test_what_triton_specialises_on_is_another_kind(tmp_path):
    """Each of these is compiled apart by Triton, and so looked up apart; a third launch of a kind asks nothing."""
    body = """
calls = [
    (x, y, 1.0, 100, 32), (x, y, 1.0, 100, 1), (x, y, 1.0, 100, 33), (x, y, 1.0, 64, 32), (x, y, 1.0, 1, 32),
    (x, None, 1.0, 100, 32), (x[1:], y, 1.0, 100, 32), (x.half(), y, 1.0, 100, 32), (x, y, 1.0, 100, 1 << 33),
]
for args in calls * 3:
    launch(kernel, (1,), args, config)
launch(kernel, (1,), calls[0], config | dict(num_warps=8))
launch(kernel, (1,), calls[0], config | dict(BLOCK=32))
print(json.dumps([len(calls), len(asked), compiled(), len(launched)]))
"""
    calls, asked, compiled, launched = program(tmp_path, body)
    assert asked == compiled == calls + 2 and launched == 3 * calls + 2


def test_what_a_kernel_is_not_specialised_on_is_compiled_once(tmp_path):
    body = """
for n in (1, 2, 15, 16, 17, 4096):
    launch(kernel, (1,), (x, y, 1.0, n, 32), config)
print(json.dumps([compiled(), len(launched)]))
"""
    assert program(tmp_path, body, unspecialized=["n"]) == [1, 6]


def test_a_kernel_that_is_not_loaded_is_refused_in_a_capture(tmp_path):
    body = """
class OnGpu(torch.Tensor):
    is_cuda = True
x = x.as_subclass(OnGpu)
torch.cuda.is_current_stream_capturing = lambda: True
try:
    launch(kernel, (1,), (x, y, 1.0, 100, 32), config)
except RuntimeError as error:
    said = str(error)
torch.cuda.is_current_stream_capturing = lambda: False
launch(kernel, (1,), (x, y, 1.0, 100, 32), config)
torch.cuda.is_current_stream_capturing = lambda: True
launch(kernel, (1,), (x, y, 1.0, 100, 32), config)
print(json.dumps([said, launched]))
"""
    said, launched = program(tmp_path, body)
    assert "_add_kernel is not loaded yet" in said and "before the capture" in said
    assert launched == ["_add_kernel"] * 2


def test_a_profiler_gets_tritons_own_launch(tmp_path):
    body = """
from triton import knobs
seen = []
knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
launch(kernel, (1,), (x, y, 1.0, 100, 32), config)
launch(kernel, (1,), (x, y, 1.0, 100, 32), config)
print(json.dumps(asked))
"""
    assert program(tmp_path, body) == [True, False, False]
