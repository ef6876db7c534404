"""What the device itself can do, measured in the process of `mla bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from mla import _mla
from mla.launch import ordinal, stream_of

from .console import make_table
from .timing import Timer, measure

_MATMUL = 8192
_GIB = 1 << 30
STREAM_TOKENS = (65536, 1048576)  # the two streams whose difference gives the rate
_STREAM_CTAS_PER_SM = 4  # with 1 or 2, 1,048,576 KV tokens take 4 % longer or as long on an H200
_TOKEN_BYTES = 1152  # of a 16-bit row of 576, in which the recorded floors count


@dataclass(frozen=True)
class Floors:
    """Limits of one device. Times in microseconds, rates in TB/s (10^12 bytes) and TFLOP/s."""

    launch_us: float  # of a kernel that does nothing
    tiny_kernel_us: float  # of torch's smallest useful kernel
    copy_tbs: float  # bytes read plus bytes written
    read_tbs: float  # one pass over 1 GiB, launch included
    stream_us: dict[int, float]  # to read so many KV tokens once
    stream_tbs: float  # between the two streams: what the launch costs drops out
    matmul_tflops: float  # 16-bit, 8192 cubed

    def case_us(self, kv_bytes: int, flop: int) -> float:
        """What no kernel beats: the bytes moved once, or the arithmetic at matmul's rate."""
        return self.launch_us + max(
            kv_bytes / (self.stream_tbs * 1e6), flop / (self.matmul_tflops * 1e6)
        )

    def beside(self, recorded: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
        """(what, here, recorded); None where a file like benchmarks/floors.json has no value."""
        streams = recorded.get("stream_us_by_kv_tokens", {})
        return [
            ("empty launch, us", self.launch_us, recorded.get("nop_us")),
            ("tiny torch kernel, us", self.tiny_kernel_us, recorded.get("tiny_torch_kernel_us")),
            ("copy, TB/s", self.copy_tbs, recorded.get("copy_TBs")),
            ("read, TB/s", self.read_tbs, recorded.get("read_TBs")),
            *(
                (f"stream of {tokens:,} KV tokens, us", us, streams.get(str(tokens)))
                for tokens, us in self.stream_us.items()
            ),
            ("matmul, TFLOP/s", self.matmul_tflops, recorded.get("matmul_bf16_8192_TFLOPs")),
        ]


def _read_once(buffer: Tensor, total: Tensor) -> None:
    """Reads a contiguous CUDA tensor once; `total`, one int32, changes."""
    properties = torch.cuda.get_device_properties(buffer.device)
    ctas = _STREAM_CTAS_PER_SM * properties.multi_processor_count
    address, device = buffer.data_ptr(), buffer.device
    _mla.launch_stream(
        address, buffer.nbytes, total.data_ptr(), ctas, ordinal(device), stream_of(device)
    )


def measure_floors(timer: Timer, device: torch.device) -> Floors:
    """Takes about a second and, while it lasts, 4 GiB of a GPU's memory."""

    def time(call: Callable[[], object]) -> float:
        return measure(timer, {"": call})[""].us

    def read(buffer: Tensor) -> float:
        total = torch.zeros((), dtype=torch.int32, device=device)
        return time(lambda: _read_once(buffer, total))

    one = torch.ones(1, device=device)
    launch_us = time(lambda: torch.cuda._sleep(0))  # type: ignore[no-untyped-call]
    tiny_us = time(one.zero_)

    source = torch.randn(max(_GIB, STREAM_TOKENS[-1] * _TOKEN_BYTES) // 4, device=device)
    stream_us = {n: read(source[: n * _TOKEN_BYTES // 4]) for n in STREAM_TOKENS}
    few, many = STREAM_TOKENS
    stream_bytes = (many - few) * _TOKEN_BYTES
    gib = source[: _GIB // 4]
    read_us = read(gib)
    target = torch.empty_like(gib)
    copy_us = time(lambda: target.copy_(gib))

    a, b = (torch.randn(_MATMUL, _MATMUL, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    matmul_us = time(lambda: torch.matmul(a, b, out=c))
    return Floors(
        launch_us=launch_us,
        tiny_kernel_us=tiny_us,
        copy_tbs=2 * _GIB / copy_us / 1e6,
        read_tbs=_GIB / read_us / 1e6,
        stream_us=stream_us,
        stream_tbs=stream_bytes / (stream_us[many] - stream_us[few]) / 1e6,
        matmul_tflops=2 * _MATMUL**3 / matmul_us / 1e6,
    )


def floors_table(floors: Floors, recorded: Path) -> Table:
    """The floors beside what a recording like benchmarks/floors.json says, if there is one."""
    then = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
    title = "limits of this device"
    if "gpu" in then:
        title += f", recorded on {then['gpu']}"
    table = make_table(title, "", "here", "recorded", "ratio", numbers=3)
    for what, here, before in floors.beside(then):
        past = ("-", "-") if before is None else (f"{before:.2f}", f"{here / before:.3f}")
        table.add_row(what, f"{here:.2f}", *past)
    return table
