"""compute-sanitizer finds nothing in any kernel of ours: memcheck, racecheck, initcheck, synccheck.

Runs with `--sanitizer`. Each tool has one process for each d_qk (sanitizer_target.py), as many at a
time as there are cores; only kernels named mla_* are instrumented. Two more launch a kernel
with a planted fault, so that a tool that looks at nothing is noticed.

racecheck is held to controls first: small kernels that hand over shared memory as ours do, right
ones and raced ones (sanitizer_controls.cu). It must tell them apart, but for those in which a lane
arrives at an mbarrier for its warp: it takes the right one for a race. What it says of the kernels
that do so is left out, as long as that is so.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import DIMS
from running import GPU_ROWS
from sanitizer_controls import KERNELS, SOURCE
from sanitizing import FOUND, NVCC_PACKAGE, SANITIZER_PACKAGE, TOOLS, Report, execute, needed, races

TARGET, CONTROLS = (Path(__file__).with_name(f"sanitizer_{it}.py") for it in ("target", "controls"))
PORTS = 16  # each process may probe ten from its first on
FIRST_PORT = 49152 + PORTS
SUMMARY = "ERROR SUMMARY: 0 errors"  # of all but racecheck
CLEAN = [(tool, d_qk, "") for tool in TOOLS for d_qk in DIMS]
FAULTY = [("memcheck", 576, "memcheck"), ("initcheck", 576, "initcheck")]
# racecheck does not see that a warp has read, and that its copies have landed, when behind
# __syncwarp one of its lanes arrives at an mbarrier for all. In these rows one does.
NOT_FOLLOWED = "control_warp_arrivals"
WARP_ARRIVALS = [
    row.name
    for row in GPU_ROWS
    if (row.pipeline == "sm80" and (row.block_rows, row.block_n, row.d_v) == (64, 16, 512))
    or row.pipeline == "sm90_swap"  # that what warpgroups exchange in a tile has been read
]

Run = tuple[str, int, str]  # tool, d_qk, planted fault
Start = Callable[[Run], Future[Report]]


@pytest.fixture(scope="module")
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts a run, once. Those that the session's tests ask for are started here."""
    if not request.config.getoption("--sanitizer"):
        pytest.skip("needs --sanitizer")
    runs: list[Run] = [
        item.callspec.params["run"]
        for item in request.session.items
        if item.get_closest_marker("sanitizer") and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def go(run: Run) -> Report:
            tool, d_qk, fault = run
            sanitizer = needed("compute-sanitizer", SANITIZER_PACKAGE)
            target = [str(TARGET), str(d_qk), "--started", str(time.time())]
            target += ["--fault", fault] if fault else []
            return execute(sanitizer, tool, "mla_", FIRST_PORT + PORTS * runs.index(run), target)

        @functools.cache
        def submit(run: Run) -> Future[Report]:
            return pool.submit(go, run)

        if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the tests
            for run in runs:
                submit(run)
        yield submit


def read(start: Start, run: Run, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and output. Shows where the time went, as the target says it."""
    status, output, seconds = start(run).result()
    if "Device not supported" in output:
        pytest.skip("needs a machine on which compute-sanitizer supports the device")
    tool, d_qk, fault = run
    times = re.findall(r"^\[ *[\d.]+ s\] .*", output, re.MULTILINE)
    with capsys.disabled():
        print(f"\n{tool} d{d_qk} {fault and 'fault '}{seconds:.1f} s", *times, sep="\n")
    return status, output


def of_rows(race: set[str], names: Iterable[str]) -> bool:
    """Whether all accesses are in kernels of these rows."""
    return all(any(kernel.startswith(f"mla_{name}_") for name in names) for kernel in race)


@pytest.fixture(scope="module")
def not_followed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> set[str]:
    """Controls that are right, and in which racecheck sees a race."""
    if not request.config.getoption("--sanitizer"):
        pytest.skip("needs --sanitizer")
    sanitizer = needed("compute-sanitizer", SANITIZER_PACKAGE)
    nvcc = needed("nvcc", NVCC_PACKAGE)
    cubin = tmp_path_factory.mktemp("controls") / "controls.cubin"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    subprocess.run([nvcc, "-O3", "-cubin", f"-arch={arch}", "-o", cubin, SOURCE], check=True)
    target = [str(CONTROLS), str(cubin)]
    _, output, _ = execute(sanitizer, "racecheck", "control_", FIRST_PORT - PORTS, target)
    if "Device not supported" in output:
        pytest.skip("needs a machine on which compute-sanitizer supports the device")
    assert f"launched: {len(KERNELS)}" in output, output[-6000:]
    seen = set().union(*races(output))
    assert {it for it in KERNELS if it.endswith("_raced")} <= seen, "it misses planted races"
    return {it for it in seen if not it.endswith("_raced")}


@pytest.mark.sanitizer
def test_racecheck_can_follow_what_our_kernels_do(not_followed: set[str]) -> None:
    """Else: pip install --group sanitizer, for a compute-sanitizer that can."""
    assert not_followed == {NOT_FOLLOWED}


@pytest.mark.sanitizer
@pytest.mark.parametrize("run", CLEAN, ids=lambda run: f"{run[0]}-d{run[1]}")
def test_finds_nothing(
    start: Start, run: Run, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    tool, d_qk, _ = run
    if not any(row.d_qk == d_qk for row in GPU_ROWS):
        pytest.skip(f"no row of the table has d_qk = {d_qk}")
    status, output = read(start, run, capsys)
    said = [line for line in output.splitlines() if line.startswith("=========")]
    report = "\n".join([*said[:60], output[-3000:]])
    if tool == "racecheck":
        left_out = (
            WARP_ARRIVALS if request.getfixturevalue("not_followed") == {NOT_FOLLOWED} else ()
        )
        kernels = [race for race in races(output) if not of_rows(race, left_out)]
        assert not kernels, f"{kernels}\n{report}"
        assert status in (0, FOUND), report
    else:
        assert status == 0, report
        assert SUMMARY in output, report
    launches = re.search(r"decode launches: (\d+)", output)
    assert launches is not None, report
    assert int(launches[1]) > 0


@pytest.mark.sanitizer
@pytest.mark.parametrize("run", FAULTY, ids=lambda run: run[2])
def test_finds_a_planted_fault(start: Start, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Our kernels are among those that it looks at."""
    _, output = read(start, run, capsys)
    what = {
        "memcheck": "Invalid __global__ write",
        "initcheck": "Uninitialized __global__ memory read",
    }
    assert what[run[2]] in output, output[-6000:]
    assert re.search(r"at .*mla_", output), output[-6000:]
