"""Time and memory of a piece of work, on a CPU or a GPU."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Work, device: str) -> float:
    """Of one run."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def least(works: list[Work], device: str, runs: int) -> list[float]:
    """Least seconds of each, in turns, so that what else the machine does meets them all alike."""
    best = [float("inf")] * len(works)
    for _ in range(runs):
        for index, work in enumerate(works):
            best[index] = min(best[index], seconds(work, device))
    return best


def peak(work: Work, device: str) -> int:
    """Most bytes that the allocator held during the work beyond what it held before."""
    if device == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    held = most = 0
    # The allocator's own events, which include what lives only inside an operator.
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
