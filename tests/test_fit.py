"""`mla fit` and the regret of the choice."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import Output, command
from mla import costs, costs_file
from mla.cli import fit, regret, runs
from mla.costs_file import Costs
from mla.device import by_name
from mla.problem import Problem
from mla.variants import VARIANTS
from test_bench import BENCHMARKS, case_entry

RECORDED = BENCHMARKS / "h200"
H200 = by_name("H200")
assert H200 is not None
in_repository = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the tests were copied out of the repository"
)


def problems() -> list[Problem]:
    sizes = itertools.product((1, 5, 32, 128), (100, 1500, 9000, 60000), (6, 16, 40, 128), (3, 64))
    return [
        Problem.from_sizes(
            b=b, h_q=h_q, d_qk=576, dtype=torch.bfloat16, page_size=page, max_pages=-(-kv // page)
        )
        for b, kv, h_q, page in sizes
    ]


def measured(
    classes: dict[str, Costs], noise: float = 0.0, pipelines: tuple[str, ...] = ("",)
) -> list[runs.Sample]:
    """As a GPU with these constants would take."""
    assert H200 is not None
    dice = random.Random(0)
    samples = []
    for problem, variant in itertools.product(problems(), VARIANTS):
        if variant.unsupported(problem.kind, H200) or not variant.name.startswith(pipelines):
            continue
        us = runs.predictor(H200, classes[costs.class_name(variant)])(variant, problem)
        us *= math.exp(dice.gauss(0, noise))
        samples.append(runs.Sample(str(problem), problem, True, variant, us))
    return samples


def other(found: Costs, factor: float) -> Costs:
    rates = {rows: rate / factor for rows, rate in found.tflops_per_sm.items()}
    return found._replace(
        start_us=found.start_us * factor,
        merge_gbs=found.merge_gbs / factor,
        tflops_per_sm=rates,
    )


def test_constants_are_found_again() -> None:
    assert H200 is not None
    begin = costs.of(H200).classes
    true = {key: other(found, 1.5) for key, found in begin.items()}
    fits = fit.fit(measured(true, noise=0.02), H200, begin)
    for key, found in fits.items():
        assert found.rms < 0.03
        assert found.costs.start_us == pytest.approx(true[key].start_us, rel=0.05)
        for rows, rate in found.costs.tflops_per_sm.items():
            assert rate == pytest.approx(true[key].tflops_per_sm[rows], rel=0.1)


def test_calls_may_take_less_in_a_smaller_pool() -> None:
    assert H200 is not None
    begin = dict(costs.of(H200).classes)
    large = [replace(s, pool=2) for s in measured(begin, pipelines=("sm90_swap",))]
    small = [replace(s, case_id=f"{s.case_id}, small", pool=1, us=s.us - 1.5) for s in large]
    found = fit.fit(large + small, H200, begin)["sm90_swap.hopper"]
    assert found.less_us == {1: pytest.approx(1.5, rel=0.05)}
    assert found.rms < 0.01
    assert found.costs.start_us == pytest.approx(begin["sm90_swap.hopper"].start_us, rel=0.01)


def test_what_was_not_measured_stays() -> None:
    assert H200 is not None
    begin = costs.of(H200).classes
    true = {key: other(found, 1.2) for key, found in begin.items()}
    some = measured(true, pipelines=("sm80_r16_n16_s8",))
    fits = fit.fit(some, H200, begin)
    found, before = fits["sm80.ampere_163k"].costs, begin["sm80.ampere_163k"]
    assert found.tflops_per_sm[16] < 0.9 * before.tflops_per_sm[16]
    assert found.tflops_per_sm[64] == pytest.approx(before.tflops_per_sm[64])
    assert found.copy_gbs_per_sm == 0.0
    assert fits["sm90_3wg.hopper"].costs == begin["sm90_3wg.hopper"]
    assert not fits["sm90_3wg.hopper"].ratios


def test_ragged_runs_are_left_out() -> None:
    assert H200 is not None
    begin = costs.of(H200).classes
    samples = [
        runs.Sample(s.case_id, s.problem, False, s.variant, 2 * s.us) for s in measured(dict(begin))
    ]
    assert {key: found.costs for key, found in fit.fit(samples, H200, begin).items()} == begin


def test_regret_is_what_the_choice_costs() -> None:
    assert H200 is not None
    begin = dict(costs.of(H200).classes)
    samples = measured(begin)
    found = regret.regrets(samples, H200, begin)
    assert len(found) == len(problems())
    assert regret.geometric_mean(found) == 1.0
    wrong = begin | {"sm80.ampere_99k": begin["sm80.ampere_99k"]._replace(start_us=0.01)}
    found = regret.regrets(samples, H200, wrong)
    assert 1.04 < regret.geometric_mean(found) < max(found).ratio
    for one in found:
        by_name = {s.variant.name: s.us for s in samples if s.case_id == one.case_id}
        assert one.ratio == pytest.approx(by_name[one.chosen] / by_name[one.best])
        assert by_name[one.best] == min(by_name.values())


@in_repository
def test_the_built_in_constants_are_those_of_the_recorded_runs(tmp_path: Path) -> None:
    """As far as it matters: the fit begins with them and stays at what they predict."""
    assert H200 is not None
    made = json.loads(costs_text())["made"]
    recorded = " ".join(str(RECORDED / name) for name in made["runs"])
    lists = " ".join(f"--cases {BENCHMARKS / name}" for name in made["cases"])
    target = tmp_path / "costs.json"
    assert command(f"fit --gpu H200 {lists} --out {target} {recorded}") == 0
    again = costs_file.parse(target.read_text(), costs_file.table_version()).classes
    built_in = costs.built_in()[2]
    for sample in measured(dict(built_in)):
        key = costs.class_name(sample.variant)
        us = runs.predictor(H200, again[key])(sample.variant, sample.problem)
        assert us == pytest.approx(sample.us, rel=0.03), sample


def costs_text() -> str:
    return (Path(costs.__file__).parent / "data" / "costs.json").read_text()


class TestCommand:
    def test_writes_constants(self, tmp_path: Path, capsys: Output) -> None:
        lists, results, target = self.files(tmp_path, "sm90_3wg_r64_n64_s2_d576", 30.0)
        assert command(f"fit --gpu H200 --cases {lists} --out {target} {results}") == 0
        written = json.loads(target.read_text())
        assert written["made"]["runs"] == [results.name]
        assert written["made"]["cases"] == [lists.name]
        assert costs_file.parse(target.read_text(), costs_file.table_version()).gpu == "H200"
        assert "the choice costs 0.00%" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("variant", "us", "message"),
        [
            ("nosuch", 1.0, "got 1.0 us of 'nosuch', expected a variant for GPUs"),
            ("cpu", 1.0, "got 1.0 us of 'cpu', expected a variant for GPUs"),
            ("sm90_3wg_r64_n64_s2_d576", 0.0, "got 0.0 us of 'sm90_3wg_r64"),
            ("sm90_3wg_r64_n64_s2_d576", "fast", "an entry is not a result"),
        ],
    )
    def test_refuses_other_results(
        self, variant: str, us: object, message: str, tmp_path: Path, capsys: Output
    ) -> None:
        lists, results, _ = self.files(tmp_path, variant, us)
        assert command(f"fit --gpu H200 --cases {lists} {results}") == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(results) in error

    def test_refuses_other_cases(self, tmp_path: Path, capsys: Output) -> None:
        lists, results, _ = self.files(tmp_path, "sm90_3wg_r64_n64_s2_d576", 1.0)
        lists.write_text(json.dumps([case_entry(id="main/other")]))
        assert command(f"fit --gpu H200 --cases {lists} {results}") == 2
        assert "main/small is in none of the files of cases" in capsys.readouterr().err

    def test_refuses_unknown_gpus(self, tmp_path: Path, capsys: Output) -> None:
        lists, results, _ = self.files(tmp_path, "sm90_3wg_r64_n64_s2_d576", 1.0)
        assert command(f"fit --gpu Voodoo --cases {lists} {results}") == 2
        assert "--gpu Voodoo: expected a GPU" in capsys.readouterr().err

    def files(self, folder: Path, variant: str, us: object) -> tuple[Path, Path, Path]:
        lists, results = folder / "cases.json", folder / "results.json"
        lists.write_text(json.dumps([case_entry()]))
        results.write_text(json.dumps([{"id": "main/small", "variant": variant, "us": us}]))
        return lists, results, folder / "costs.json"
