"""How `mla bench` times a call: by the GPU, one call at a time, with a cold cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
_MAX_SLEEP_US = 5000.0
_FORGOTTEN = 0.8  # of the host's time, with each call that takes less


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one call: on the device, and what the host needs to issue it."""

    us: float
    host_us: float


class Timer(Protocol):
    """Times one call at a time."""

    warmups: int
    repeat: int

    def sample(self, call: Callable[[], object]) -> Timing: ...


class GpuTimer:
    """Events around one call.

    Before each, a read of 256 MB leaves L2 full of other, clean lines, as it is between the layers
    of a model (a fill would leave dirty lines, whose write-back disturbs the call). Then the device
    sleeps, long enough for the host to run ahead.
    """

    def __init__(self, device: torch.device, repeat: int = 20):
        self.warmups, self.repeat = 5, repeat
        self._flush = torch.ones(_FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._sink = torch.empty((), dtype=torch.float32, device=device)
        self._stream = torch.cuda.current_stream(device)
        self._begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._host_us = 100.0
        self._cycles_per_us = self._calibrate()

    def _calibrate(self) -> float:
        cycles = 1_000_000
        for _ in range(2):  # the first one warms up
            self._begin.record(self._stream)
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            self._end.record(self._stream)
            self._end.synchronize()
        return cycles / self._elapsed_us()

    def _elapsed_us(self) -> float:
        return float(self._begin.elapsed_time(self._end)) * 1e3

    def sample(self, call: Callable[[], object]) -> Timing:
        torch.sum(self._flush, dim=0, out=self._sink)
        sleep_us = min(2 * self._host_us + 20, _MAX_SLEEP_US)
        torch.cuda._sleep(int(sleep_us * self._cycles_per_us))  # type: ignore[no-untyped-call]
        self._begin.record(self._stream)
        start = perf_counter()
        call()
        host_us = (perf_counter() - start) * 1e6
        self._host_us = max(host_us, self._host_us * _FORGOTTEN)  # others may take turns
        self._end.record(self._stream)
        self._end.synchronize()
        return Timing(self._elapsed_us(), host_us)


class CpuTimer:
    """Wall clock around one call."""

    def __init__(self, repeat: int = 3):
        self.warmups, self.repeat = 1, repeat

    def sample(self, call: Callable[[], object]) -> Timing:
        start = perf_counter()
        call()
        us = (perf_counter() - start) * 1e6
        return Timing(us, us)


def measure(timer: Timer, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """Median of the timer's samples for each call; several calls take turns, sample by sample."""
    samples: dict[str, list[Timing]] = {name: [] for name in calls}
    for i in range(timer.warmups + timer.repeat):
        for name, call in calls.items():
            timing = timer.sample(call)
            if i >= timer.warmups:
                samples[name].append(timing)
    return {
        name: Timing(median(t.us for t in timings), median(t.host_us for t in timings))
        for name, timings in samples.items()
    }
