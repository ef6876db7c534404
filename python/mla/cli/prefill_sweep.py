"""`mla bench --prefill`: both ways of prefill, over new tokens, cached tokens and heads."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import mla
from mla.prefill_times import METHODS, Method

from .console import console, make_progress, make_table
from .devices import device_name
from .prefill_points import DIMS, Point, write
from .results import conditions_of, write_conditions
from .timing import CpuTimer, GpuTimer, measure

HEADS = (16, 128)
NEW = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
CACHED = (0, 512, 2048, 8192, 32768, 65536)
ON_CPU = ((4,), (1, 48), (0, 100))
DTYPE, PAGE_SIZE = torch.bfloat16, 64
LONG_US, LONG_REPEAT = 10_000.0, 3  # calls that take longer are measured fewer times
METHOD = (
    "one request in bf16; both methods in turns; us: events around one call, plan before the "
    "clock, output allocation inside, after a read of 256 MB and a sleep on the device; host_us: "
    "what the host needs to queue the same calls, by its clock, while the device sleeps; plan_us: "
    "to make the plan"
)
ON_CPU_METHOD = "wall clock around one call"


class Inputs:
    """Random tensors for all points, the pages scattered over the cache."""

    def __init__(self, device: torch.device, heads: Iterable[int], most: int, longest: int):
        generator = torch.Generator(device).manual_seed(0)
        pages = -(-longest // PAGE_SIZE)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

        d = DIMS
        self.cache = normal(pages, PAGE_SIZE, d.d_qk)
        self.table = torch.randperm(pages, generator=generator, device=device).int()[None]
        self.q = {h: normal(1, most, h, d.head_dim) for h in heads}
        self.w_kv_b = {h: normal(h * (d.nope + d.v), d.kv_lora) * d.kv_lora**-0.5 for h in heads}

    def plan(self, heads: int, new: int, cached: int, method: Method) -> mla.PrefillPlan:
        return mla.plan_prefill(
            *self._where(new + cached),
            dims=replace(DIMS, heads=heads),
            dtype=DTYPE,
            num_pages=len(self.cache),
            page_size=PAGE_SIZE,
            s=new,
            method=method,
        )

    def call(self, heads: int, new: int, cached: int, plan: mla.PrefillPlan) -> Callable[[], Any]:
        # As a layer's query lies (query_rows.py).
        q_rope, q_nope = self.q[heads][:, :new].split_with_sizes((DIMS.rope, DIMS.nope), -1)
        table, lens = self._where(new + cached)
        weights, scale = self.w_kv_b[heads], DIMS.head_dim**-0.5
        return lambda: mla.prefill(
            (q_nope, q_rope), self.cache, table, lens, weights, scale=scale, plan=plan
        )

    def _where(self, length: int) -> tuple[Tensor, Tensor]:
        lens = torch.tensor([length], dtype=torch.int32, device=self.table.device)
        return self.table[:, : -(-length // PAGE_SIZE)], lens


def run(args: Namespace, device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    timer = GpuTimer(device, args.repeat or 10) if on_gpu else CpuTimer(args.repeat or 1)
    timer.warmups = 2 if on_gpu else 1
    heads, new, cached = (HEADS, NEW, CACHED) if on_gpu else ON_CPU
    inputs = Inputs(device, heads, max(new), max(new) + max(cached))
    points = []
    with torch.inference_mode(), make_progress() as progress:
        for h, s, n in progress.track(list(product(heads, new, cached)), description="points"):
            points.append(_measured(inputs, timer, h, s, n))
    console.print(_table(device, points))
    if args.json:
        write(args.json, points)
        path = args.json.with_name(f"{args.json.stem}.meta.json")
        write_conditions(path, conditions_of(device, METHOD if on_gpu else ON_CPU_METHOD))
        console.print(f"wrote {args.json}")
    return 0


def _measured(
    inputs: Inputs, timer: GpuTimer | CpuTimer, heads: int, new: int, cached: int
) -> Point:
    calls: dict[str, Callable[[], Any]] = {}
    plan_us: dict[Method, float] = {}
    attention = ""
    for method in METHODS:
        seconds = []
        for _ in range(3):
            start = perf_counter()
            plan = inputs.plan(heads, new, cached, method)
            seconds.append(perf_counter() - start)
        plan_us[method] = median(seconds) * 1e6
        calls[method] = inputs.call(heads, new, cached, plan)
        attention = calls[method]().attention  # the first call of a size prepares kernels
    usual = timer.repeat
    if max(timer.sample(call).us for call in calls.values()) > LONG_US:
        timer.repeat = min(usual, LONG_REPEAT)
    times = measure(timer, calls)
    timer.repeat = usual
    us = {method: times[method].us for method in METHODS}
    host_us = {method: times[method].host_us for method in METHODS}
    return Point(heads, new, cached, us, host_us, plan_us, attention)


def _table(device: torch.device, points: list[Point]) -> Table:
    host = (f"host, {method}" for method in METHODS)
    columns = ("heads", "new", "cached", *METHODS, "ratio", *host)
    table = make_table(f"prefill, us, {device_name(device)}", *columns, "by", numbers=len(columns))
    for p in points:
        a, e = (p.us[method] for method in METHODS)
        numbers = (str(p.heads), str(p.new), str(p.cached), f"{a:.1f}", f"{e:.1f}", f"{a / e:.2f}")
        table.add_row(*numbers, *(f"{p.host_us[m]:.0f}" for m in METHODS), p.attention)
    return table
