"""`mla bench`: how long decode takes on a list of cases, and how near that is to the limits."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

import mla
from mla import dispatch
from mla.checks import D_V
from mla.variants import VARIANTS

from . import append_sweep, host, prefill_sweep, prompt
from .arguments import UsageError
from .calls import HEURISTIC, call, pick, replayed, requested
from .cases import Case, CasePool, load_cases, with_overrides
from .console import console, make_progress
from .devices import device_name, pick_device
from .floors import Floors, floors_table, measure_floors
from .results import (
    Result,
    conditions_of,
    result_table,
    summary_table,
    write_conditions,
    write_results,
)
from .timing import CpuTimer, GpuTimer, measure

BATCH_INVARIANT = "batch_invariant"  # follows a name in the name of a run in that mode
EAGER, REPLAYED = "one call, output allocation inside", "one replay of the graph of one call"
METHOD = (
    "events around {}, after a read of 256 MB and a sleep on the device; pages scattered at "
    "random, random data"
)


def run(args: Namespace) -> int:
    device = pick_device(args.device)
    peer_times = _prepare_files(args)
    if args.graph and (device.type != "cuda" or args.host or args.prefill or args.prompt):
        raise UsageError("--graph replays cases, on a GPU: it goes with no other kind of run")
    if args.host:
        return _run_host(args, device)
    if args.prefill:
        return prefill_sweep.run(args, device)
    if args.prompt:
        return prompt.run(args, device)
    if args.append:
        return append_sweep.run(args, device)
    cases = _select(args, device)
    on_gpu = device.type == "cuda"
    timer = GpuTimer(device, args.repeat or 20) if on_gpu else CpuTimer(args.repeat or 3)
    console.print(f"{device_name(device)}, {len(cases)} cases", style="bold")
    floors = measure_floors(timer, device) if on_gpu else None
    if floors:
        console.print(floors_table(floors, args.cases.with_name("floors.json")))

    runs: dict[str, tuple[dispatch.Forced | None, bool]] = {}  # and whether batch-invariant
    for name in args.variant or [HEURISTIC]:
        runs[name] = requested(name), False
        if args.batch_invariant:
            runs[f"{name}.{BATCH_INVARIANT}"] = requested(name), True
    results: list[Result] = []
    skipped: list[str] = []
    pool = CasePool(cases, device)
    with make_progress() as progress:
        for case in progress.track(cases, description="cases"):
            inputs = pool.inputs(case)
            floor_us = floors.case_us(case.io_bytes, case.flop) if floors else None
            variants, calls = {}, {}
            for name, (request, invariant) in runs.items():
                try:
                    variant = pick(case, device, request, args.targets, invariant).name
                except mla.UnsupportedError as error:
                    skipped.append(f"{name} on {case.id}: {error}")
                else:
                    variants[name] = variant
                    timed = call(case, inputs, variant, args.planning, invariant)
                    calls[name] = replayed(timed) if args.graph else timed
            for name, timing in measure(timer, calls).items():
                results.append(Result(name, case, variants[name], timing, floor_us))

    _print_results(list(runs), results, skipped)
    _write_files(args, device, floors, list(runs), results, peer_times)
    return 2 if skipped else 0


def _run_host(args: Namespace, device: torch.device) -> int:
    _check_dims(args)
    if len(args.variant or []) > 1 or args.plot or args.report:
        raise UsageError("--host takes one --variant at most, and draws no --plot or --report")
    for name in args.variant or []:
        requested(name)
    return host.run(args, device)


def _check_dims(args: Namespace) -> None:
    d_qk, d_v = args.dims
    if D_V.get(d_qk) != d_v:
        names = ", ".join(f"{qk}/{v}" for qk, v in D_V.items())
        raise UsageError(f"--dims {d_qk}/{d_v}: expected one of {names}")


def _select(args: Namespace, device: torch.device) -> list[Case]:
    if args.targets and args.targets not in {variant.targets for variant in VARIANTS}:
        names = ", ".join(dict.fromkeys(variant.targets for variant in VARIANTS))
        raise UsageError(f"--targets {args.targets}: expected one of {names}")
    _check_dims(args)
    cases = load_cases(args.cases)
    if args.filter:
        cases = [case for case in cases if args.filter in case.id]
    elif device.type == "cpu":
        console.print("On a CPU only the tiny cases are run; --filter selects others.")
        cases = [case for case in cases if case.size.startswith("tiny")]
    if not cases:
        raise UsageError(f"no case of {args.cases} is left")
    return [
        with_overrides(case, dims=args.dims, dtype=args.dtype, page_size=args.page_size)
        for case in cases
    ]


def _prepare_files(args: Namespace) -> dict[str, dict[str, float]]:
    """What would keep the results from being written is said before they are measured.

    The times of others that --peers names.
    """
    for path in (args.json, args.plot):
        if path and not path.parent.is_dir():
            raise UsageError(f"no such folder: {path.parent}")
    if args.report and not args.report.parent.is_dir():
        raise UsageError(f"no such folder: {args.report.parent}")
    if args.peers and not args.report:
        raise UsageError("--peers belongs to --report")
    if args.peers and (args.dims != (576, 512) or args.dtype or args.page_size):
        raise UsageError("--peers has times of the cases as they are, without other sizes")
    if args.plot:
        import_module("mla.cli.plot")
    if args.report:
        from .report import read_peers

        return read_peers(args.peers) if args.peers else {}
    return {}


def _print_results(runs: list[str], results: list[Result], skipped: list[str]) -> None:
    console.print(result_table(results))
    for name in runs:
        measured = [result for result in results if result.run == name and result.floor_us]
        if measured:
            console.print(summary_table(f"geometric means, {name}", measured))
    if skipped:
        console.print(f"{len(skipped)} not measured, the first: {skipped[0]}", style="yellow")


def _write_files(
    args: Namespace,
    device: torch.device,
    floors: Floors | None,
    runs: list[str],
    results: list[Result],
    peer_times: dict[str, dict[str, float]],
) -> None:
    """The files asked for. Of several runs each has its own, named after it."""
    method = METHOD.format(REPLAYED if args.graph else EAGER)
    conditions = conditions_of(device, method if floors else prefill_sweep.ON_CPU_METHOD) | {
        "graph": args.graph,
        "planning": "inside the clock" if args.planning else "before the clock",
        "floors": asdict(floors) if floors else None,
    }
    for name in runs if args.json else ():
        path: Path = args.json
        if len(runs) > 1:
            path = path.with_name(f"{path.stem}.{name}{path.suffix}")
        write_results(path, [result for result in results if result.run == name])
        write_conditions(path.with_name(f"{path.stem}.meta.json"), conditions)
        console.print(f"wrote {path}")
    if args.plot and results:
        from .plot import draw

        draw(args.plot, device_name(device), results)
        console.print(f"wrote {args.plot}")
    if args.report and results:
        from .report import write

        peers = {result.case.id: dict(result.case.peer_us) for result in results}
        for case, times in peer_times.items():
            peers.setdefault(case, {}).update(times)
        console.print(f"wrote {write(args.report, results, floors, conditions, peers)}")
