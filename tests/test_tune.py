"""`mla tune`, with times that a model makes up."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import mla
import pytest
import torch
from command_line import Output, command
from mla import costs, costs_file, dispatch, tuned
from mla.cli import tune
from mla.cli.cases import Case
from mla.cli.runs import predictor
from mla.cli.timing import Timing
from mla.costs_file import Costs
from mla.device import Device, by_name
from mla.variants import VARIANTS


@pytest.fixture
def where() -> Device:
    found = by_name("H200")
    assert found is not None
    return found


@pytest.fixture
def true(where: Device, monkeypatch: pytest.MonkeyPatch) -> dict[str, Costs]:
    """A GPU with an H200's name, on which sm90_3wg is slow, and nothing else of a GPU."""
    found = dict(costs.of(where).classes)
    slow = found["sm90_3wg.hopper"]
    found["sm90_3wg.hopper"] = slow._replace(
        start_us=2 * slow.start_us, tflops_per_sm={64: slow.tflops_per_sm[64] / 2}
    )
    named = {variant.name: variant for variant in VARIANTS}

    class NoPool:
        def __init__(self, cases: list[Case], device: torch.device):
            pass

        def inputs(self, case: Case) -> Case:
            return case

    def timed(timer: object, calls: Mapping[str, Callable[[], Case]]) -> dict[str, Timing]:
        def us(name: str, case: Case) -> float:
            variant = named[name]
            return predictor(where, found[costs.class_name(variant)])(variant, case.problem())

        return {name: Timing(us(name, call()), 1.0) for name, call in calls.items()}

    def call(case: Case, inputs: Case, *args: object, **kwargs: object) -> Callable[[], Case]:
        return lambda: inputs

    monkeypatch.setattr(tune, "pick_device", lambda text: torch.device("cuda", 0))
    monkeypatch.setattr(tune, "facts", lambda device: where)
    monkeypatch.setattr(tune, "GpuTimer", lambda device, repeat: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    for name, value in (("CasePool", NoPool), ("measure", timed), ("call", call)):
        monkeypatch.setattr(tune, name, value)
    return found


def test_what_it_writes_is_what_dispatch_reads(
    where: Device, true: dict[str, Costs], tmp_path: Path, capsys: Output
) -> None:
    before = mla.explain(device=where, b=64).variant
    assert before is not None
    assert before.pipeline == "sm90_3wg"
    times = tmp_path / "times.json"
    assert command(f"tune --count 60 --json {times}") == 0
    path = tuned.path_of(where)
    assert f"wrote {path}" in capsys.readouterr().out.replace("\n", "")
    dispatch.forget()
    told = mla.explain(device=where, b=64)
    assert told.costs == f"tuned on this GPU ({path})"
    assert told.variant is not None
    assert told.variant.pipeline == "sm90_2wg"
    written = costs_file.parse(path.read_text(), costs_file.table_version())
    assert (written.gpu, written.sm_count) == ("H200", 132)
    for key, found in true.items():
        assert written.classes[key].start_us == pytest.approx(found.start_us, rel=0.1)
    entries = json.loads(times.read_text())
    assert {entry["id"].partition("_")[0] for entry in entries} == {
        f"random/{i:03d}" for i in range(60)
    }
    assert json.loads(path.read_text())["made"]["cases"] == 60


def test_the_seed_decides(true: dict[str, Costs], tmp_path: Path) -> None:
    def written(seed: int) -> str:
        path = tmp_path / "out.json"
        assert command(f"tune --count 30 --seed {seed} --out {path}") == 0
        return path.read_text()

    assert written(5) == written(5) != written(6)


def test_a_time_limit_ends_it(
    where: Device,
    true: dict[str, Costs],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(tune, "monotonic", lambda: next(clock))
    assert command("tune --count 60 --time-limit 30") == 0
    assert json.loads(tuned.path_of(where).read_text())["made"]["cases"] == 30
    clock = iter(range(1000))
    assert command("tune --count 60 --time-limit 3") == 2
    assert "3 cases were measured, a fit needs 20" in capsys.readouterr().err


def test_worse_constants_are_not_written(
    where: Device, true: dict[str, Costs], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    ratios = iter([1.2, 1.1])  # with the new ones, and so far
    monkeypatch.setattr(tune, "geometric_mean", lambda found: next(ratios))
    assert command("tune --count 30") == 0
    assert not tuned.path_of(where).exists()
    assert "is not written: the choice is better as it is" in capsys.readouterr().out


def test_asks_first_where_to_write(
    true: dict[str, Costs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    (tmp_path / "file").write_text("")
    assert command(f"tune --out {tmp_path}/file/costs.json") == 2
    assert "cannot write" in capsys.readouterr().err
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setattr(tune.os, "access", lambda path, mode: path != closed)  # root may anything
    assert command(f"tune --out {closed}/costs.json") == 2
    assert "the folder is read-only" in capsys.readouterr().err


def test_not_on_a_cpu(capsys: Output) -> None:
    assert command("tune --device cpu") == 2
    assert "nothing to tune on a CPU" in capsys.readouterr().err


def test_only_variants_that_run(true: dict[str, Costs], where: Device) -> None:
    a100 = by_name("A100")
    assert a100 is not None
    (case,) = tune.parse_cases(next(tune.random_cases(0)) for _ in range(1))
    assert {v.targets for v in tune._able(case, a100)} == {"ampere_163k", "ampere_99k"}
    assert "hopper" in {v.targets for v in tune._able(case, where)}
