"""The README's measured tables are what the recorded runs say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import pytest
from test_bench import BENCHMARKS
from test_readme import README

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the tests were copied out of the repository"
)
MEASURED = README.partition("<!-- measured: benchmarks/h200 -->")[2].partition("<!-- end of")[0]


def by_id(name: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in json.loads((BENCHMARKS / f"{name}.json").read_text())}


def best_of_others() -> dict[str, float]:
    times = json.loads((BENCHMARKS / "peers.json").read_text())
    return {case: min(of_case.values()) for case, of_case in times.items()}


def table(of: str) -> list[list[str]]:
    """Rows of the table that has a column of this name, without its head."""
    tables = re.findall(r"(?:^\|.*\|\n)+", MEASURED, re.MULTILINE)
    (found,) = [lines for lines in tables if of in lines.splitlines()[0].split(" | ")]
    return [re.split(r" +\| +", line.strip("| ")) for line in found.splitlines()[2:]]


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def case_of(row: list[str]) -> str:
    heads, requests, tokens = row[:3]
    return f"fa2/b{requests}_q1_h{heads}_s{tokens}"


def test_what_dispatch_chooses() -> None:
    cases, ours, best = by_id("fa2_cases"), by_id("h200/fa2_cases"), best_of_others()
    rows = table("`mla` us")
    assert [case_of(row) for row in rows] == list(cases)
    for row in rows:
        case = case_of(row)
        us, floor_us = ours[case]["us"], cases[case]["floor_us"]
        numbers = (f"{best[case]:.1f}", f"{floor_us:.1f}", f"{us:.1f}")
        assert row[3:] == [*numbers, f"{best[case] / us:.2f}", f"{floor_us / us:.2f}"], case


def test_all_cases_against_the_best_of_the_others() -> None:
    cases, ours, best = by_id("cases"), by_id("h200/cases"), best_of_others()
    assert set(ours) == set(cases) == {case for case in best if not case.startswith("fa2/")}
    ratios = [best[case] / ours[case]["us"] for case in cases]
    of_floor = geomean(cases[case]["floor_us"] / ours[case]["us"] for case in cases)
    said = re.search(r"dispatch\s+([\d.]+)x\s+\(([\d.]+)x\)\s+and\s+([\d.]+)\s+of", MEASURED)
    assert said is not None
    figures = (geomean(ratios), min(ratios), of_floor)
    assert said.groups() == tuple(f"{figure:.2f}" for figure in figures)


def test_other_runs_of_all_cases() -> None:
    """Pipelines forced in turns; the calls replayed as graphs, and with the plan in the clock."""
    cases, best = by_id("cases"), best_of_others()

    def ratio(run: str) -> str:
        ours = by_id(f"h200/{run}")
        return f"{geomean(best[case] / ours[case]['us'] for case in cases):.2f}x"

    said = r"{}`?(?:\s+forced)?\s+([\d.]+x)"
    for pipeline in ("sm90_3wg", "sm90_2wg", "sm90_swap"):
        (record,) = (BENCHMARKS / "h200").glob(f"cases.{pipeline}_*_d576.json")
        found = re.search(said.format(pipeline), MEASURED)
        assert found is not None
        assert found[1] == ratio(f"cases.{record.name.split('.')[1]}"), pipeline
    replayed = re.search(r"longer\s+in\s+the\s+mean,\s+([\d.]+x)", MEASURED)
    planning = re.search(r"in\s+the\s+clock\s+dispatch\s+is\s+at\s+([\d.]+x)", MEASURED)
    assert replayed is not None
    assert planning is not None
    assert replayed[1] == ratio("cases.replayed")
    assert planning[1] == ratio("cases.planning")


def test_sm80() -> None:
    cases = by_id("fa2_cases")
    ours = [by_id(f"h200/fa2_cases.ampere_{kib}k") for kib in (163, 99)]
    rows = table("`fa2` us")
    assert [case_of(row) for row in rows] == list(cases)
    for row in rows:
        case = cases[case_of(row)]
        fa2_us, floor_us = case["peer_us"]["FlashInfer fa2"], case["floor_us"]
        want = [f"{fa2_us:.1f}", f"{floor_us:.1f}"]
        for run in ours:
            us = run[case["id"]]["us"]
            assert us < fa2_us
            want += [f"{us:.1f}", f"{fa2_us / us:.2f}", f"{floor_us / us:.2f}"]
        assert row[3:] == want, case["id"]


def test_prompts_and_generation() -> None:
    recorded = json.loads((BENCHMARKS / "h200" / "prompt.json").read_text())
    runs = {(r["kind"], r["tokens"], r["way"]): r for r in recorded}
    ways = ("matmul", "absorbed", "expanded", "switch")
    rows = table("un-absorbed")
    assert len(rows) * len(ways) == len(runs)
    for name, *cells in rows:
        kind = "generation" if "behind" in name else "prompt"
        tokens = int(name.split()[-1])
        rates = [runs[kind, tokens, way]["tokens_per_s"] for way in ways]
        want = [f"{rate:.0f}" for rate in rates]
        if kind == "prompt":
            buffers = [runs[kind, tokens, way]["buffer_mb"] for way in ways]
            want = [f"{rate} ({mb:.0f} MB)" for rate, mb in zip(want, buffers, strict=True)]
        assert cells == [*want, f"{rates[-1] / rates[0]:.2f}"], name
