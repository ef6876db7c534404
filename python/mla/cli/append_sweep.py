"""`mla bench --append`: rows of new tokens into the cache, over their number, rotated or not."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

import mla
from mla.models import MODELS

from .console import console, make_progress, make_table
from .devices import device_name
from .floors import Floors, measure_floors
from .prefill_sweep import DTYPE, ON_CPU_METHOD, PAGE_SIZE
from .results import conditions_of, write_conditions
from .timing import CpuTimer, GpuTimer, measure

DIMS = MODELS["DeepSeek-V3"].dims
SIZES = ((1, 1), (128, 1), (1, 2048), (1, 16384))  # requests, and new tokens of each
ON_CPU = ((1, 1), (3, 1), (1, 40))
KINDS = {"as it is": False, "rotated": True}  # rope columns
PAST = 1000  # tokens before the new ones of the first request; one more in each other
METHOD = (
    "events around one call, after a read of 256 MB and a sleep on the device; pages scattered; "
    "bytes: rows read and written, angles, positions and page ids; floor_us: an empty launch and "
    "the bytes at the rate of the stream that this run measured"
)


@dataclass(frozen=True)
class Entry:
    """One call."""

    requests: int
    new: int  # tokens of each request
    rotated: bool
    bytes: int
    us: float
    host_us: float
    floor_us: float | None  # None on a CPU

    @property
    def gbs(self) -> float:
        return self.bytes / self.us / 1e3

    def as_dict(self) -> dict[str, object]:
        """Times to a hundredth."""
        entry = {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return entry | {"gbs": float(f"{self.gbs:.4g}")}


def run(args: Namespace, device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    timer = GpuTimer(device, args.repeat or 20) if on_gpu else CpuTimer(args.repeat or 3)
    floors = measure_floors(timer, device) if on_gpu else None
    entries: list[Entry] = []
    with torch.inference_mode(), make_progress() as progress:
        for b, new in progress.track(SIZES if on_gpu else ON_CPU, description="sizes"):
            calls = {name: _call(b, new, rotated, device) for name, rotated in KINDS.items()}
            for name, timing in measure(timer, calls).items():
                moved = moved_bytes(b * new, KINDS[name])
                floor_us = floors.case_us(moved, 0) if floors else None
                entries.append(
                    Entry(b, new, KINDS[name], moved, timing.us, timing.host_us, floor_us)
                )
    console.print(_table(device, entries))
    if args.json:
        _write(args, device, floors, entries)
    return 0


def moved_bytes(tokens: int, rotated: bool) -> int:
    """What a call reads and writes at least: rows twice, angles, a position and a page id each."""
    return tokens * (2 * DTYPE.itemsize * DIMS.d_qk + (4 * DIMS.rope if rotated else 0) + 8)


def _call(b: int, new: int, rotated: bool, device: torch.device) -> Callable[[], None]:
    d, longest = DIMS, PAST + b + new
    pages = -(-longest // PAGE_SIZE)
    cache = torch.zeros(b * pages, PAGE_SIZE, d.d_qk, dtype=DTYPE, device=device)
    table = torch.randperm(b * pages, device=device).int().view(b, pages)
    rows = torch.randn(b, new, d.d_qk, device=device).to(DTYPE)
    latent, rope = rows[..., : d.kv_lora], rows[..., d.kv_lora :]
    starts, places = (torch.arange(n, dtype=torch.int32, device=device) for n in (b, new))
    positions = PAST + starts[:, None] + places
    angles = mla.rope.Rotary().table(d.rope, longest, device) if rotated else None
    return lambda: mla.append(latent, rope, cache, table, positions, cos_sin=angles)


def _table(device: torch.device, entries: list[Entry]) -> Table:
    columns = ("requests", "new each", "rotated", "bytes", "us", "host us", "GB/s", "% of floor")
    table = make_table(f"append, {device_name(device)}", *columns, numbers=len(columns))
    for e in entries:
        share = "-" if e.floor_us is None else f"{100 * e.floor_us / e.us:.1f}"
        table.add_row(
            str(e.requests), str(e.new), "yes" if e.rotated else "no", str(e.bytes), f"{e.us:.2f}",
            f"{e.host_us:.1f}", f"{e.gbs:.4g}", share,
        )  # fmt: skip
    return table


def _write(
    args: Namespace, device: torch.device, floors: Floors | None, entries: list[Entry]
) -> None:
    """A JSON list with one entry per line, and the conditions beside it."""
    lines = ",\n".join(json.dumps(e.as_dict()) for e in entries)
    args.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    conditions = conditions_of(device, METHOD if floors else ON_CPU_METHOD)
    path = args.json.with_name(f"{args.json.stem}.meta.json")
    write_conditions(path, conditions | {"floors": asdict(floors) if floors else None})
    console.print(f"wrote {args.json}")
