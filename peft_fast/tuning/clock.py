"""Timings in rounds, each function once per round, so that a slow moment of the machine hits all alike.

On the CPU a timing is the process's CPU time: with one thread it is the wall time of a quiet machine, on any machine.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

_SAMPLE_SECONDS = 3e-3  # a sample is as many calls as take this long
_LONG = 100 * _SAMPLE_SECONDS  # of a call: one is enough to see that one is a sample
_MAX_ROUNDS = 101


def interleaved(
    functions: dict[str, Callable[[int], Any]], device: torch.device, seconds: float, min_rounds: int = 7
) -> dict[str, list[float]]:
    """Seconds per call of each function, one entry per round; the order rotates from round to round."""
    names = list(functions)
    calls = {name: _calls_per_sample(functions[name], device) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(_MAX_ROUNDS):
            if done >= min_rounds and time.perf_counter() - start > seconds:
                break
            turn = done % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(sample(functions[name], calls[name], device))
            gc.collect(0)
    finally:
        gc.enable()
    return samples


def sample(function: Callable[[int], Any], calls: int, device: torch.device) -> float:
    """Seconds per call over ``calls`` calls."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        for i in range(calls):
            function(i)
        end.record()
        torch.cuda.synchronize(device)
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / calls
    begin = time.process_time()
    for i in range(calls):
        function(i)
    return (time.process_time() - begin) / calls


def _calls_per_sample(function: Callable[[int], Any], device: torch.device) -> int:
    function(0)
    if sample(function, 1, device) > _LONG:
        return 1
    once = sample(function, 3, device)
    if once > _SAMPLE_SECONDS:
        return 1
    return max(1, min(1000, round(_SAMPLE_SECONDS / max(once, 1e-7))))


def graphed(function: Callable[[int], Any], calls: int) -> Callable[[int], Any]:
    """``calls`` calls captured in one CUDA graph; a call of the result replays them and returns what the last gives."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            function(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    result: list[Any] = []
    with torch.cuda.graph(graph):
        for i in range(calls):
            result[:] = [function(i)]

    def replay(i: int) -> Any:
        graph.replay()
        return result[0]

    return replay
