"""`mla bench --host`: what a call costs the CPU, whatever the GPU does meanwhile."""

from __future__ import annotations

import gc
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import thread_time

import torch
from torch import Tensor

import mla
from mla import _mla
from mla.checks import DTYPES
from mla.device import facts
from mla.launch import ordinal, stream_of

from .console import console, make_table
from .devices import device_name

B, H_Q, MAX_PAGES = 32, 16, 64
# Of one batch, between two waits: with three launches each they fit into the driver's queue.
CALLS_ON_GPU, CALLS_ON_CPU = 50, 2


@dataclass(frozen=True)
class HostCall:
    """Something to be timed; `call` is given a number that it never had before."""

    name: str
    call: Callable[[int], object]


def run(args: Namespace, device: torch.device) -> int:
    """Prints microseconds of CPU time per call, median of `--repeat` batches."""
    calls = CALLS_ON_GPU if facts(device).type == "cuda" else CALLS_ON_CPU
    batches = args.repeat or 20
    with torch.inference_mode():
        timed = {
            each.name: cpu_us(each.call, calls, batches, device)
            for each in host_calls(args, device, calls * (batches + 1))
        }
    title = f"CPU time per call, {device_name(device)}, torch {torch.__version__}"
    table = make_table(title, "call", "us", numbers=1)
    for name, us in timed.items():
        table.add_row(name, f"{us:.2f}")
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(timed, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {args.json}")
    return 0


def cpu_us(call: Callable[[int], object], calls: int, batches: int, device: torch.device) -> float:
    """Of one call in this thread; a batch before the clock warms up."""
    samples = []
    gc.collect()
    gc.disable()
    try:
        for first in range(0, calls * (batches + 1), calls):
            start = thread_time()
            for i in range(first, first + calls):
                call(i)
            samples.append((thread_time() - start) / calls * 1e6)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    finally:
        gc.enable()
    return median(samples[1:])


def host_calls(args: Namespace, device: torch.device, most: int) -> list[HostCall]:
    """Each will be called `most` times. Requests of one token, so that the device keeps up."""
    d_qk, d_v = args.dims
    dtype = next(d for d, name in DTYPES.items() if name == (args.dtype or "bfloat16"))
    page_size = args.page_size or 64
    (variant,) = args.variant or [None]
    batch_invariant: bool = args.batch_invariant

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    q = zeros(B, 1, H_Q, d_qk)
    caches = [zeros(1, page_size, d_qk) for _ in range(2)]  # as of two layers
    columns = MAX_PAGES + most // B
    table = zeros(B, columns, dtype=torch.int32)
    lens = torch.ones(B, dtype=torch.int32, device=device)
    out, lse = zeros(B, 1, H_Q, d_v), zeros(B, 1, H_Q, dtype=torch.float32)

    def plan_of(b: int) -> mla.Plan:
        return mla.plan(
            lens[:b],
            h_q=H_Q,
            d_qk=d_qk,
            dtype=dtype,
            page_size=page_size,
            variant=variant,
            batch_invariant=batch_invariant,
        )

    plans = {b: plan_of(b) for b in range(1, B + 1)}

    def decode(b: int, pages: int, given: bool, planned: bool) -> Callable[[int], object]:
        """As a model's layers write it, in turns. Its tensors are cut before the clock starts."""
        rows, pages_of, lens_of = q[:b], table[:b, :pages], lens[:b]
        to, lse_to = (out[:b], lse[:b]) if given else (None, None)
        plan = plans[b] if planned else None
        return lambda i: mla.decode(
            rows,
            caches[i % 2],
            pages_of,
            lens_of,
            scale=0.1,
            return_lse=True,
            out=to,
            lse=lse_to,
            plan=plan,
            batch_invariant=batch_invariant,
            variant=variant,
        )

    def first(planned: bool) -> Callable[[int], object]:
        # The largest comes first: no other waits for a larger workspace.
        calls = [decode(B - i % B, columns - i // B, True, planned) for i in range(most)]
        return lambda i: calls[i](i)

    return [
        HostCall("outputs given", decode(B, MAX_PAGES, True, False)),
        HostCall("outputs given, with a plan", decode(B, MAX_PAGES, True, True)),
        HostCall("outputs made", decode(B, MAX_PAGES, False, False)),
        HostCall("outputs made, with a plan", decode(B, MAX_PAGES, False, True)),
        HostCall("first of a shape", first(False)),
        HostCall("first of a shape, with a plan", first(True)),
        HostCall("plan.update", lambda _: plans[B].update(lens)),
        HostCall("mla.plan", lambda _: plan_of(B)),
        *_others(out, lse),
    ]


def _others(out: Tensor, lse: Tensor) -> list[HostCall]:
    """What is not ours: the making of outputs by torch, and on a GPU launches by the driver."""

    device, made = out.device, [(t.shape, t.stride(), t.dtype) for t in (out, lse)]

    def outputs(_: int) -> object:
        return [torch.empty_strided(n, s, dtype=dtype, device=device) for n, s, dtype in made]

    others = [HostCall("two torch.empty_strided", outputs)]
    gpu = facts(device)
    if gpu.type != "cuda":
        return others
    where = ordinal(device), stream_of(device)

    def launch(beside: bool) -> Callable[[int], object]:
        return lambda _: _mla.launch_empty(beside, *where)

    def queue(launches: int) -> Callable[[int], object]:
        return lambda _: _mla.queue_empty(launches, *where)

    others.append(HostCall("an empty launch", launch(False)))
    if gpu.sm >= 90:
        others.append(HostCall("an empty launch beside another", launch(True)))
    others += [HostCall(f"{n} empty launches as of a call", queue(n)) for n in (2, 3)]
    return others
