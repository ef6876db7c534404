"""`mla tune`: fits the constants that dispatch predicts by to the GPU at hand."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from time import monotonic

import torch
from rich.progress import Progress

from mla import costs, costs_file, tuned
from mla.device import Device, facts
from mla.variants import VARIANTS, Variant

from .calls import call
from .cases import Case, CasePool, parse_cases
from .console import console, make_progress
from .devices import kernel_driver, pick_device
from .fit import facts_of, fit, fit_table, fitted
from .random_cases import random_cases
from .regret import geometric_mean, print_regret, regrets
from .runs import Sample, sample
from .timing import GpuTimer, Timer, measure
from .usage import UsageError

LEAST_CASES = 20  # that a fit needs
_LARGEST_GIB = 16  # of KV, and at most half of what is free
_LEAST_BYTES = 16 << 20  # below, no draw would fit
_FLOP_SECONDS = 0.02  # of a case, at the peak


@dataclass
class Sweep:
    """What was measured."""

    samples: list[Sample] = field(default_factory=list)
    cases: int = 0


def run(args: Namespace) -> int:
    target = pick_device(args.device)
    if target.type != "cuda":
        raise UsageError("there is nothing to tune on a CPU: it has one variant")
    device = facts(target)
    rivals = [variant for variant in VARIANTS if not variant.unsupported_device(device)]
    if not rivals:
        raise UsageError(f"no variant runs on {device}: {device.problem or 'see mla info'}")
    path: Path = args.out or tuned.path_of(device)
    _check_writable(path)
    drawn = parse_cases(islice(_cases_for(device, target, args.seed), args.count))
    console.print(f"{device}, {len(drawn)} cases", style="bold")
    deadline = monotonic() + args.time_limit if args.time_limit else None
    timer = GpuTimer(target, args.repeat or 10)
    with make_progress() as progress:
        swept = sweep(drawn, target, device, timer, deadline, progress)
    return finish(swept, device, path, args)


def _cases_for(device: Device, target: torch.device, seed: int) -> Iterator[dict[str, object]]:
    free, _ = torch.cuda.mem_get_info(target)
    kv_bytes = max(min(_LARGEST_GIB << 30, free // 2), _LEAST_BYTES)
    return random_cases(seed, kv_bytes, device.tflops * 1e12 * _FLOP_SECONDS)


def _check_writable(path: Path) -> None:
    """Before minutes of measuring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from None
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: the folder is read-only")


def sweep(
    cases: list[Case],
    target: torch.device,
    device: Device,
    timer: Timer,
    deadline: float | None,
    progress: Progress,
) -> Sweep:
    """Each variant that can run a case, in turns, until the cases or the time are up."""
    pool, done = CasePool(cases, target), Sweep()
    for case in progress.track(cases, description="cases"):
        if deadline is not None and monotonic() > deadline:
            break
        inputs = pool.inputs(case)
        calls = {
            variant.name: call(case, inputs, variant.name, planning=False, batch_invariant=False)
            for variant in _able(case, device)
        }
        timed = measure(timer, calls)
        named = {variant.name: variant for variant in VARIANTS}
        done.samples += [sample(case, named[name], timing.us) for name, timing in timed.items()]
        done.cases += 1
    return done


def _able(case: Case, device: Device) -> Iterable[Variant]:
    return (v for v in VARIANTS if not v.unsupported(case.problem().kind, device))


def finish(swept: Sweep, device: Device, path: Path, args: Namespace) -> int:
    """Fits, tells what came of it, and writes the file if the choice is not worse with it."""
    if args.json:
        write_samples(args.json, swept.samples)
        console.print(f"wrote {args.json}")
    if swept.cases < LEAST_CASES:
        raise UsageError(
            f"{swept.cases} cases were measured, a fit needs {LEAST_CASES}: give a longer "
            "--time-limit or a larger --count"
        )
    used = costs.of(device)
    fits = fit(swept.samples, device, used.classes)
    console.print(fit_table(device, fits))
    before = regrets(swept.samples, device, used.classes)
    after = regrets(swept.samples, device, fitted(fits))
    console.print(f"so far ({used.source}):")
    print_regret(before)
    console.print("with the new constants:")
    print_regret(after)
    if geometric_mean(after) > geometric_mean(before):
        console.print(f"{path} is not written: the choice is better as it is", style="yellow")
        return 0
    made = {
        "date": date.today().isoformat(),
        "kernel_driver": kernel_driver(),
        "torch": torch.__version__,
        "seed": args.seed,
        "cases": swept.cases,
        **facts_of(fits),
    }
    try:
        tuned.save(path, costs_file.dump(device.name, device.sm_count, fitted(fits), made))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from None
    costs.forget()
    console.print(f"wrote {path}: processes that start from now on choose by it")
    return 0


def write_samples(path: Path, samples: list[Sample]) -> None:
    """As `mla bench --json` writes results, of all variants in one file."""
    lines = (
        json.dumps({"id": s.case_id, "us": round(s.us, 2), "variant": s.variant.name})
        for s in samples
    )
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
