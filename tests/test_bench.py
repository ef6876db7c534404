"""`mla bench`: what it reads, times, computes and writes."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mla
import pytest
import torch
from command_line import Output, command
from fake_driver import AS_H200
from mla.cli import calls, cases, check, floors, plot, results, timing

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FLOORS = floors.Floors(
    launch_us=3.0,
    tiny_kernel_us=4.0,
    copy_tbs=4.2,
    read_tbs=4.3,
    stream_us={65536: 20.0, 1048576: 260.0},
    stream_tbs=4.6,
    matmul_tflops=790.0,
)


def case_entry(**changes: object) -> dict[str, object]:
    entry: dict[str, object] = {
        "id": "main/small",
        "b": 2,
        "s_q": 1,
        "h_q": 4,
        "causal": False,
        "page_size": 16,
        "dtype": "bfloat16",
        "seq_lens": [40, 7],
        "floor_us": 4.0,
        "bound": "memory",
    }
    return entry | changes


@pytest.fixture
def case_file(tmp_path: Path) -> Path:
    path = tmp_path / "cases.json"
    second = case_entry(id="mtp/small", s_q=2, causal=True, peer_us={"other": 9.0})
    path.write_text(json.dumps([case_entry(), second]))
    return path


def test_both_modes_beside_each_other(case_file: Path, tmp_path: Path) -> None:
    options = f"--device cpu --cases {case_file} --json {tmp_path / 'r.json'} --repeat 1"
    assert command(f"bench {options} --batch-invariant --variant cpu") == 0
    for name in ("r.cpu.json", "r.cpu.batch_invariant.json"):
        entries = json.loads((tmp_path / name).read_text())
        assert {entry["variant"] for entry in entries} == {"cpu"}
        assert len(entries) == 2


def test_bench_writes_what_a_comparison_reads(
    case_file: Path, tmp_path: Path, capsys: Output
) -> None:
    target, picture = tmp_path / "results.json", tmp_path / "results.png"
    options = f"--device cpu --cases {case_file} --json {target} --plot {picture} --repeat 2"
    assert command(f"bench {options}") == 0
    by_id = {entry["id"]: entry for entry in json.loads(target.read_text())}
    assert set(by_id) == {"main/small", "mtp/small"}
    for entry in by_id.values():
        assert entry["us"] > 0
        assert entry["variant"] == "cpu"
        assert entry["floor_us"] is None
    conditions = json.loads((tmp_path / "results.meta.json").read_text())
    assert conditions["torch"] == torch.__version__
    assert conditions["planning"] == "before the clock"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "mtp/small" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["json", "plot"])
def test_bench_asks_first_where_to_write(option: str, case_file: Path, capsys: Output) -> None:
    line = f"bench --device cpu --cases {case_file} --{option} {case_file.parent}/none/file"
    assert command(line) == 2
    assert "no such folder" in capsys.readouterr().err


def test_plot_without_matplotlib(
    case_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.delitem(sys.modules, "mla.cli.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(f"bench --device cpu --cases {case_file} --plot {case_file}.png") == 2
    assert capsys.readouterr().err == "mla bench: needs matplotlib: pip install 'mla[cli]'\n"


def test_bench_filter_and_overrides(case_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    options = (
        f"--device cpu --cases {case_file} --json {target} --filter mtp --variant cpu "
        "--dims 288/256 --dtype fp16 --page-size 1 --planning --repeat 1"
    )
    assert command(f"bench {options}") == 0
    assert [entry["id"] for entry in json.loads(target.read_text())] == ["mtp/small"]
    conditions = json.loads((tmp_path / "results.meta.json").read_text())
    assert conditions["planning"] == "inside the clock"


def test_bench_of_several_names_writes_a_file_each(case_file: Path, tmp_path: Path) -> None:
    pipeline = mla.variants()[0].pipeline
    options = f"--device cpu --cases {case_file} --json {tmp_path}/r.json --repeat 1"
    line = f"{options} --variant cpu --variant {pipeline}"
    assert command(f"bench {line}") == 2  # the second cannot run here
    assert len(json.loads((tmp_path / "r.cpu.json").read_text())) == 2
    assert json.loads((tmp_path / f"r.{pipeline}.json").read_text()) == []


def test_bench_on_a_cpu_takes_tiny_cases(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case_entry(b=1, seq_lens=[9000])]))
    assert command(f"bench --device cpu --cases {path}") == 2
    output = capsys.readouterr()
    assert "only the tiny cases" in output.out
    assert "no case" in output.err


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '[{"id": "x"}]', "null"])
def test_bench_refuses_other_files(text: str, tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "cases.json"
    path.write_text(text)
    assert command(f"bench --device cpu --cases {path}") == 2
    assert str(path) in capsys.readouterr().err


def test_measure_takes_turns_and_medians() -> None:
    order: list[str] = []

    class Scripted:
        warmups, repeat = 1, 3

        def sample(self, call: Callable[[], object]) -> timing.Timing:
            call()
            return timing.Timing(float(len(order)), 1.0)

    calls = {name: functools.partial(order.append, name) for name in "ab"}
    measured = timing.measure(Scripted(), calls)
    assert order == list("abababab")
    assert measured["a"].us == 5.0  # of 3, 5, 7; the first sample, 1, warmed up
    assert measured["b"].us == 6.0


def result(case: cases.Case, us: float) -> results.Result:
    floor_us = FLOORS.case_us(case.io_bytes, case.flop)
    return results.Result("heuristic", case, "row", timing.Timing(us, 30.0), floor_us)


def test_fractions_of_floors(case_file: Path, capsys: Output) -> None:
    case = cases.load_cases(case_file)[1]
    assert case.io_bytes == (47 * 576 + 2 * 2 * 4 * (576 + 512)) * 2
    assert case.flop == 2 * 2 * 4 * 47 * (576 + 512)
    assert FLOORS.case_us(int(4.6e6), 0) == pytest.approx(4.0)
    assert FLOORS.case_us(0, int(790e6)) == pytest.approx(4.0)
    measured = result(case, 8.0)
    assert measured.of_recorded == pytest.approx(0.5)
    assert measured.of_floor == pytest.approx(FLOORS.case_us(case.io_bytes, case.flop) / 8)

    console = check.console
    console.print(results.result_table([measured]))
    console.print(results.summary_table("means", [measured, result(case, 32.0)]))
    printed = capsys.readouterr().out
    assert "1.12x" in printed  # the peer's 9 us
    assert "25.0" in printed  # geometric mean of 50 % and 12.5 % of the recorded floor
    assert "12.5" in printed


def test_lines_of_several_runs_have_their_names(case_file: Path, capsys: Output) -> None:
    case = cases.load_cases(case_file)[1]
    runs = [replace(result(case, 8.0), run=run) for run in ("one", "one.batch_invariant")]
    check.console.print(results.result_table(runs))
    printed = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in printed if line.strip().startswith(case.id)]
    assert [line[1] for line in lines] == ["one", "one.batch_invariant"]


def test_other_dims_have_no_recorded_floor(case_file: Path) -> None:
    case = cases.load_cases(case_file)[1]
    other = cases.with_overrides(case, dims=(320, 256), dtype="float16", page_size=1)
    assert result(other, 8.0).of_recorded is None
    assert not other.peer_us
    assert (other.d_qk, other.d_v, other.dtype, other.page_size) == (320, 256, torch.float16, 1)


def test_floors_beside_a_recording(tmp_path: Path, capsys: Output) -> None:
    recorded = tmp_path / "floors.json"
    check.console.print(floors.floors_table(FLOORS, recorded))
    assert "empty launch" in capsys.readouterr().out
    recorded.write_text(json.dumps({"gpu": "a card", "copy_TBs": 2.1}))
    check.console.print(floors.floors_table(FLOORS, recorded))
    printed = capsys.readouterr().out
    assert "a card" in printed
    assert "2.000" in printed  # 4.2 / 2.1


def test_floors_are_rates_of_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a timer that says of each call that it took 10 us more than the last."""

    class Counting:
        warmups, repeat = 0, 1
        us = 0.0

        def sample(self, call: Callable[[], object]) -> timing.Timing:
            call()
            self.us += 10.0
            return timing.Timing(self.us, 1.0)

    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(floors, "_read_once", lambda buffer, total: None)
    monkeypatch.setattr(floors, "_GIB", 1 << 20)
    monkeypatch.setattr(floors, "_MATMUL", 64)
    monkeypatch.setattr(floors, "STREAM_TOKENS", (100, 1100))
    found = floors.measure_floors(Counting(), torch.device("cpu"))
    assert (found.launch_us, found.tiny_kernel_us) == (10.0, 20.0)
    assert found.stream_us == {100: 30.0, 1100: 40.0}
    assert found.stream_tbs == pytest.approx(1000 * 1152 / 10e6)
    assert found.read_tbs == pytest.approx(2**20 / 50e6)
    assert found.copy_tbs == pytest.approx(2 * 2**20 / 60e6)
    assert found.matmul_tflops == pytest.approx(2 * 64**3 / 70e6)


def test_plot_of_floors(case_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot.draw(path, "title", [result(case, 8.0) for case in cases.load_cases(case_file)])
    assert path.stat().st_size > 1000


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the tests were copied out of the repository")
@pytest.mark.parametrize(("name", "count"), [("cases.json", 139), ("fa2_cases.json", 8)])
def test_recorded_cases(name: str, count: int) -> None:
    loaded = cases.load_cases(BENCHMARKS / name)
    assert len({case.id for case in loaded}) == len(loaded) == count
    recorded = json.loads((BENCHMARKS / "floors.json").read_text())
    assert all(before for _, _, before in FLOORS.beside(recorded))
    for case in loaded:
        floor_us = case.recorded_floor_us
        assert floor_us is not None
        assert 0.7 < FLOORS.case_us(case.io_bytes, case.flop) / floor_us < 1.1


HOST_CALLS = [
    "outputs given",
    "outputs given, with a plan",
    "outputs made",
    "outputs made, with a plan",
    "first of a shape",
    "first of a shape, with a plan",
    "plan.update",
    "mla.plan",
    "two torch.empty_strided",
]
EMPTY_LAUNCHES = [  # what else there is on a GPU
    "an empty launch",
    "an empty launch beside another",
    "2 empty launches as of a call",
    "3 empty launches as of a call",
]


def test_host_times_each_kind_of_call(tmp_path: Path, capsys: Output) -> None:
    target = tmp_path / "host.json"
    assert command(f"bench --host --device cpu --repeat 1 --dims 320/256 --json {target}") == 0
    timed = json.loads(target.read_text())
    assert list(timed) == HOST_CALLS
    assert min(timed.values()) > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in timed)


def test_host_calls_are_what_they_are_called(run: Any) -> None:
    """As on a GPU: which of them are prepared, and what each launches."""
    script = """
from argparse import Namespace
from mla.cli.host import host_calls
args = Namespace(dims=(576, 512), dtype=None, page_size=None, variant=None, batch_invariant=False)
def told(call, first):
    before = _mla.num_prepared()
    for i in range(first, first + 3):
        call(i)
    return _mla.num_prepared() - before
for each in host_calls(args, torch.device("cpu"), 6):
    told(each.call, 0)
    torch._C._cuda_getCurrentRawStream = {0: 1000 + len(each.name)}.__getitem__
    print(each.name, told(each.call, 3), sep="|")
    torch._C._cuda_getCurrentRawStream = {0: 77}.__getitem__
"""
    done = run(script, prologue=AS_H200)
    new = dict(line.split("|") for line in done.printed.splitlines())
    assert list(new) == [*HOST_CALLS, *EMPTY_LAUNCHES]
    assert {name for name, count in new.items() if count != "0"} == set(HOST_CALLS[4:6])
    empty = [x for x in done.named("launch") if x["kernel"] == "mla_empty"]
    first, beside = (False, True), (True, True)
    assert [(x["beside"], x["graph"] > 0) for x in empty] == [
        *[(False, False)] * 6,
        *[(True, False)] * 6,
        *[first, beside] * 6,
        *[first, beside, beside] * 6,
    ]
    for name in HOST_CALLS:
        kernels = [x["kernel"] for x in done.named("launch") if x["stream"] == 1000 + len(name)]
        plans = 0 if "with a plan" in name or name in HOST_CALLS[8:] else 3
        decodes = 0 if name in HOST_CALLS[6:] else 3
        assert sum(kernel.startswith("mla_plan") for kernel in kernels) == plans, name
        assert len(kernels) == plans + 2 * decodes, name


@pytest.mark.parametrize("options", ["--variant sm80 --variant cpu", "--plot x.png", "--dims 1/1"])
def test_host_refuses_what_it_does_not_do(options: str, capsys: Output) -> None:
    assert command(f"bench --host --device cpu {options}") == 2
    assert "mla bench: --" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["", "--host", "--prefill", "--prompt"])
def test_graphs_are_of_cases_on_a_gpu(options: str, case_file: Path, capsys: Output) -> None:
    assert command(f"bench --graph --device cpu --cases {case_file} {options}") == 2
    assert "--graph replays cases, on a GPU" in capsys.readouterr().err


def test_a_replay_is_of_one_call_that_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        assert isinstance(graph, Graph)
        events.append("begin")
        yield
        events.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    replay = calls.replayed(functools.partial(events.append, "call"))
    assert events == ["call", "begin", "call", "end"]
    replay()
    assert events[4:] == ["replay"]
