"""`mla check`: every variant that runs here, against the float64 reference."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import mla
from mla import dispatch, reference
from mla.checks import D_V
from mla.device import facts
from mla.problem import Problem
from mla.variants import VARIANTS, Variant

from .accuracy import RELATIVE_RMSE, Accuracy, compare
from .arguments import UsageError
from .console import console, make_progress, make_table
from .devices import device_name, pick_device
from .problems import FULL, QUICK, CheckInputs, CheckProblem, make_inputs

_SHOWN_FAULTS = 5  # of each variant


@dataclass
class Report:
    """What became of one variant."""

    results: dict[torch.dtype, list[Accuracy]] = field(
        default_factory=lambda: {dtype: [] for dtype in RELATIVE_RMSE}
    )
    faults: list[str] = field(default_factory=list)


def run(args: Namespace) -> int:
    devices = [torch.device("cpu")]
    device = pick_device(args.device)
    if device not in devices:
        devices.append(device)
    variants = _admitted(args.variant)
    reports: dict[str, Report] = {}
    idle: dict[str, list[str]] = {}
    for variant in variants:
        reasons = [variant.unsupported_device(facts(device)) for device in devices]
        if all(reasons):
            idle[variant.name] = reasons[-1]
        else:
            reports[variant.name] = Report()
    if not reports:
        why = "; ".join(f"{name} {', '.join(reasons)}" for name, reasons in idle.items())
        raise UsageError(f"nothing to check: {why}")

    jobs = [
        (device, d_qk, dtype, problem)
        for device in devices
        for d_qk in D_V
        for dtype in RELATIVE_RMSE
        for problem in (FULL if args.full else QUICK)
    ]
    with make_progress() as progress:
        for device, d_qk, dtype, problem in progress.track(jobs, description="problems"):
            sizes = _sizes(problem, d_qk, dtype)
            able = [v for v in variants if not v.unsupported(sizes.kind, facts(device))]
            if able:
                generator = torch.Generator().manual_seed(args.seed)
                inputs = make_inputs(problem, d_qk, D_V[d_qk], dtype, device, generator)
                _check(able, inputs, sizes, f"{problem.name}, {d_qk}/{D_V[d_qk]}", reports)
    _print(devices, reports, idle)
    return 1 if any(report.faults for report in reports.values()) else 0


def _admitted(names: Sequence[str] | None) -> list[Variant]:
    try:
        requests = [dispatch.forced(name) for name in names or ()]
    except ValueError as error:
        raise UsageError(str(error)) from None
    wanted = [request for request in requests if request]
    return [v for v in VARIANTS if not wanted or any(it.admits(v) for it in wanted)]


def _sizes(problem: CheckProblem, d_qk: int, dtype: torch.dtype) -> Problem:
    b = len(problem.seq_lens)
    return Problem.from_sizes(
        b=b,
        s_q=problem.tokens[0],
        total_q=sum(problem.tokens) if problem.ragged else None,
        h_q=problem.h_q,
        d_qk=d_qk,
        dtype=dtype,
        page_size=problem.page_size,
        max_pages=problem.columns,
    )


def _check(
    variants: list[Variant],
    inputs: CheckInputs,
    sizes: Problem,
    what: str,
    reports: dict[str, Report],
) -> None:
    """Runs each variant with and without a plan made before; both must give the same bits."""
    want = reference.decode(
        inputs.q_packed,
        inputs.kv_packed,
        inputs.block_table,
        inputs.seq_lens,
        scale=inputs.scale,
        causal=inputs.causal,
        cu_seqlens_q=inputs.cu_seqlens_q,
    )
    for variant in variants:
        plan = mla.plan(
            inputs.seq_lens,
            s_q=sizes.s_q,
            cu_seqlens_q=inputs.cu_seqlens_q,
            total_q=sizes.total_q if sizes.ragged else None,
            h_q=sizes.h_q,
            d_qk=sizes.d_qk,
            dtype=sizes.dtype,
            page_size=sizes.page_size,
            max_pages=sizes.max_pages,
            variant=variant.name,
        )
        out, lse = _decode(inputs, variant, want, None)
        again = _decode(inputs, variant, want, plan)
        accuracy = compare(out, lse, *want, inputs.scale)
        report = reports[variant.name]
        report.results[sizes.dtype].append(accuracy)
        faults = list(accuracy.faults)
        if plan.variant is not variant:
            faults.append(f"{plan.variant.name} ran instead")
        if not faults and not (torch.equal(out, again[0]) and torch.equal(lse, again[1])):
            faults.append("a second run, with a plan, gave other bits")
        report.faults += [f"{what}, {str(sizes.dtype)[6:]}: {fault}" for fault in faults]


def _decode(
    inputs: CheckInputs,
    variant: Variant,
    want: tuple[torch.Tensor, torch.Tensor],
    plan: mla.Plan | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Into poisoned outputs, so that an element left unwritten is found."""
    (want_out, want_lse), nan = want, float("nan")
    return mla.decode(
        inputs.q,
        inputs.kv_cache,
        inputs.block_table,
        inputs.seq_lens,
        scale=inputs.scale,
        causal=inputs.causal,
        cu_seqlens_q=inputs.cu_seqlens_q,
        out=torch.full_like(want_out, nan, dtype=inputs.q_packed.dtype),
        lse=torch.full_like(want_lse, nan, dtype=torch.float32),
        return_lse=True,
        plan=plan,
        variant=variant.name,
    )


def _print(
    devices: list[torch.device], reports: dict[str, Report], idle: dict[str, list[str]]
) -> None:
    console.print(", ".join(map(device_name, devices)), style="bold")
    columns = ("runs", "cosine", "RMSE bf16", "RMSE fp16", "max abs", "lse", "")
    table = make_table("largest errors", "variant", *columns, numbers=len(columns))
    for name, report in reports.items():
        results = [accuracy for run in report.results.values() for accuracy in run]
        table.add_row(
            name,
            str(len(results)),
            _largest([accuracy.out.cosine_distance for accuracy in results]),
            *(
                _largest([accuracy.out.relative_rmse for accuracy in run])
                for run in report.results.values()
            ),
            _largest([accuracy.out.max_abs for accuracy in results]),
            _largest([accuracy.lse for accuracy in results]),
            "[red]WRONG[/]" if report.faults else "[green]ok[/]",
        )
    console.print(table)
    for name, report in reports.items():
        for fault in report.faults[:_SHOWN_FAULTS]:
            console.print(f"[red]{name}[/]: {fault}")
        if len(report.faults) > _SHOWN_FAULTS:
            console.print(f"[red]{name}[/]: and {len(report.faults) - _SHOWN_FAULTS} more")
    for why in dict.fromkeys("; ".join(reasons) for reasons in idle.values()):
        names = [name for name, reasons in idle.items() if "; ".join(reasons) == why]
        console.print(f"not run here ({why}): {', '.join(names)}", style="dim")
    wrong = [name for name, report in reports.items() if report.faults]
    verdict = f"{len(reports) - len(wrong)} of {len(reports)} variants are right"
    console.print(verdict, style="bold red" if wrong else "bold green")


def _largest(values: list[float]) -> str:
    """nan outweighs everything."""
    return f"{torch.tensor(values or [0.0]).max():.1e}"
