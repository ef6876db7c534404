"""`mla bench`: how long decode takes on a list of cases, and how near that is to the limits."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

import mla
from mla import dispatch
from mla.checks import D_V
from mla.device import facts
from mla.problem import Problem
from mla.variants import VARIANTS, Variant

from .arguments import UsageError
from .cases import Case, CaseInputs, CasePool, load_cases, with_overrides
from .console import console, make_progress
from .devices import device_name, kernel_driver, pick_device
from .floors import Floors, floors_table, measure_floors
from .results import Result, result_table, summary_table, write_conditions, write_results
from .timing import CpuTimer, GpuTimer, measure

SCALE = 192**-0.5  # of DeepSeek-V3's un-absorbed heads, without YaRN
HEURISTIC = "heuristic"  # what a run without a forced name is called
METHOD = (
    "events around one call, output allocation inside, after a read of 256 MB and a sleep on the "
    "device; pages scattered at random, random data"
)


def run(args: Namespace) -> int:
    device = pick_device(args.device)
    cases = _select(args, device)
    _prepare_files(args)
    on_gpu = device.type == "cuda"
    timer = GpuTimer(device, args.repeat or 20) if on_gpu else CpuTimer(args.repeat or 3)
    console.print(f"{device_name(device)}, {len(cases)} cases", style="bold")
    floors = measure_floors(timer, device) if on_gpu else None
    if floors:
        console.print(floors_table(floors, args.cases.with_name("floors.json")))

    runs = list(dict.fromkeys(args.variant or [HEURISTIC]))
    requests = {name: _request(name) for name in runs}
    results: list[Result] = []
    skipped: list[str] = []
    pool = CasePool(cases, device)
    with make_progress() as progress:
        for case in progress.track(cases, description="cases"):
            inputs = pool.inputs(case)
            floor_us = floors.case_us(case.io_bytes, case.flop) if floors else None
            variants, calls = {}, {}
            for name in runs:
                try:
                    variants[name] = _pick(case, device, requests[name], args.targets).name
                except mla.UnsupportedError as error:
                    skipped.append(f"{name} on {case.id}: {error}")
                else:
                    calls[name] = _call(case, inputs, variants[name], args.planning)
            for name, timing in measure(timer, calls).items():
                results.append(Result(name, case, variants[name], timing, floor_us))

    _print_results(runs, results, skipped)
    _write_files(args, device, floors, runs, results)
    return 2 if skipped else 0


def _select(args: Namespace, device: torch.device) -> list[Case]:
    if args.targets and args.targets not in {variant.targets for variant in VARIANTS}:
        names = ", ".join(dict.fromkeys(variant.targets for variant in VARIANTS))
        raise UsageError(f"--targets {args.targets}: expected one of {names}")
    d_qk, d_v = args.dims
    if D_V.get(d_qk) != d_v:
        names = ", ".join(f"{qk}/{v}" for qk, v in D_V.items())
        raise UsageError(f"--dims {d_qk}/{d_v}: expected one of {names}")
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


def _prepare_files(args: Namespace) -> None:
    """What would keep the results from being written is said before they are measured."""
    for path in (args.json, args.plot):
        if path and not path.parent.is_dir():
            raise UsageError(f"no such folder: {path.parent}")
    if args.plot:
        import_module("mla.cli.plot")


def _request(name: str) -> dispatch.Forced | None:
    try:
        return dispatch.forced(None if name == HEURISTIC else name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _pick(
    case: Case, device: torch.device, request: dispatch.Forced | None, targets: str | None
) -> Variant:
    """What dispatch would choose if the table had only the rows of `targets`."""
    problem = Problem.from_sizes(
        b=case.b,
        s_q=case.s_q,
        h_q=case.h_q,
        d_qk=case.d_qk,
        dtype=case.dtype,
        page_size=case.page_size,
        max_pages=max(-(-length // case.page_size) for length in case.seq_lens),
    )
    choice = dispatch.weigh(problem, facts(device), request)
    admitted = [
        variant
        for variant in VARIANTS
        if variant.name in choice.estimates
        and (request is None or request.admits(variant))
        and targets in (None, variant.targets)
    ]
    if not admitted:
        raise dispatch.refusal(problem, facts(device), choice)

    def predicted_us(variant: Variant) -> float:
        estimate = choice.estimates[variant.name]
        return estimate.us if estimate else 0.0

    return min(admitted, key=predicted_us)


def _call(case: Case, inputs: CaseInputs, variant: str, planning: bool) -> Callable[[], object]:
    """What is timed: one decode, with its plan made before, or inside when `planning`."""
    plan = None
    if not planning:
        plan = mla.plan(
            inputs.seq_lens,
            s_q=case.s_q,
            h_q=case.h_q,
            d_qk=case.d_qk,
            dtype=case.dtype,
            page_size=case.page_size,
            max_pages=inputs.block_table.shape[1],
            variant=variant,
        )
    return lambda: mla.decode(
        inputs.q,
        inputs.kv_cache,
        inputs.block_table,
        inputs.seq_lens,
        scale=SCALE,
        causal=case.causal,
        plan=plan,
        variant=variant,
    )


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
) -> None:
    """The files asked for. Of several runs each has its own, named after it."""
    conditions = {
        "device": device_name(device),
        "kernel_driver": kernel_driver(),
        "torch": torch.__version__,
        "build": mla.info()["build"],
        "method": METHOD if floors else "wall clock around one call",
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
