"""What `mla bench` measured: numbers, tables of them, and the files that keep them."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

import mla

from .cases import Case
from .console import make_table
from .devices import device_name, kernel_driver
from .timing import Timing


@dataclass(frozen=True)
class Result:
    """One case in one run: under the heuristic or a forced name.

    `floor_us` is what the device's limits, measured in the same process, allow; None on a CPU.
    """

    run: str
    case: Case
    variant: str
    timing: Timing
    floor_us: float | None

    @property
    def gbs(self) -> float:
        """10^9 bytes per second, counting KV, q and out once."""
        return self.case.io_bytes / self.timing.us / 1e3

    @property
    def tflops(self) -> float:
        return self.case.flop / self.timing.us / 1e6

    @property
    def of_floor(self) -> float | None:
        """1 at the limit that this run measured."""
        return self.floor_us / self.timing.us if self.floor_us else None

    @property
    def of_recorded(self) -> float | None:
        """1 at the limit that the case file records."""
        floor_us = self.case.recorded_floor_us
        return floor_us / self.timing.us if floor_us and self.floor_us else None

    def as_dict(self) -> dict[str, object]:
        """An entry of the results file; `id`, `us` and `variant` are what comparisons read."""
        return {
            "id": self.case.id,
            "us": round(self.timing.us, 2),
            "variant": self.variant,
            "host_us": round(self.timing.host_us, 1),
            "gbs": float(f"{self.gbs:.4g}"),
            "tflops": float(f"{self.tflops:.4g}"),
            "floor_us": None if self.floor_us is None else round(self.floor_us, 2),
        }


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def result_table(results: list[Result]) -> Table:
    """One line per case and run, with the run's name where there are several."""
    several = len({result.run for result in results}) > 1
    on_gpu = [result for result in results if result.floor_us]
    peers = list(dict.fromkeys(name for result in on_gpu for name in result.case.peer_us))
    columns = ["us", "host us", "GB/s", "TFLOP/s", "% of floor", "% of recorded"]
    columns += [f"{name} / us" for name in peers]
    names = ("case", "run", "variant") if several else ("case", "variant")
    table = make_table("times", *names, *columns, numbers=len(columns))
    for result in results:
        others = (result.case.peer_us.get(name) for name in peers)
        table.add_row(
            result.case.id,
            *([result.run] if several else []),
            result.variant,
            f"{result.timing.us:.2f}",
            f"{result.timing.host_us:.0f}",
            f"{result.gbs:.4g}",
            f"{result.tflops:.4g}",
            _percent(result.of_floor),
            _percent(result.of_recorded),
            *("-" if us is None else f"{us / result.timing.us:.2f}x" for us in others),
        )
    return table


def geomean(fractions: list[float]) -> float:
    return math.exp(sum(map(math.log, fractions)) / len(fractions))


def classes(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By set and by size, in the order of their names; all of them last."""
    found: dict[str, list[Result]] = {}
    for result in results:
        size = result.case.size
        for name in (result.case.id.split("/")[0], size.split("-")[0], size, "all"):
            found.setdefault(name, []).append(result)
    return dict(sorted(found.items(), key=lambda entry: (entry[0] == "all", entry[0])))


def summary_table(title: str, results: list[Result]) -> Table:
    """Geometric mean and worst fraction of the floor per class of case."""
    columns = ("cases", "% of floor", "worst", "% of recorded", "worst")
    table = make_table(title, "class", *columns, numbers=len(columns))
    for name, members in classes(results).items():
        cells: list[str] = []
        for fractions in (
            [r.of_floor for r in members if r.of_floor],
            [r.of_recorded for r in members if r.of_recorded],
        ):
            cells += [_percent(geomean(fractions)), _percent(min(fractions))] if fractions else "--"
        table.add_row(name, str(len(members)), *cells)
    return table


def write_results(path: Path, results: list[Result]) -> None:
    """A JSON list with one result per line."""
    lines = ",\n".join(json.dumps(result.as_dict()) for result in results)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_conditions(path: Path, conditions: dict[str, object]) -> None:
    """What the numbers beside it were measured on, and how: a JSON object."""
    path.write_text(json.dumps(conditions, indent=1) + "\n", encoding="utf-8")


def conditions_of(device: torch.device, method: str) -> dict[str, object]:
    """Of any run: the command to repeat it, the commit of the checkout, what it ran on, and how."""
    return {
        "command": shlex.join(["mla", *sys.argv[1:]]),
        "commit": _commit(),
        "device": device_name(device),
        "kernel_driver": kernel_driver(),
        "torch": torch.__version__,
        "build": mla.info()["build"],
        "method": method,
    }


def _commit() -> str | None:
    """Of the checkout in the current folder, with -dirty after local changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
