"""compute-sanitizer finds nothing in any kernel of ours: memcheck, racecheck, initcheck, synccheck.

Runs with `--sanitizer`. Each tool has one process for each d_qk (sanitizer_target.py), as many at a
time as there are cores; only kernels named mla_* are instrumented. Two more launch a kernel
with a planted fault, so that a tool that looks at nothing is noticed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import DIMS
from running import GPU_ROWS

TARGET = Path(__file__).with_name("sanitizer_target.py")
TIMEOUT = 400  # seconds a process
FOUND = 86  # exit status when the tool has found something
ENVIRONMENT = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # one cudaMalloc a tensor, no reuse
    "OMP_NUM_THREADS": "1",  # as many processes as cores run at a time
}
OPTIONS = {
    "memcheck": ["--padding", "512", "--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "analysis"],
    "initcheck": [],
    "synccheck": [],
}
SUMMARY = dict.fromkeys(OPTIONS, "ERROR SUMMARY: 0 errors") | {
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
}
CLEAN = [(tool, d_qk, "") for tool in OPTIONS for d_qk in DIMS]
FAULTY = [("memcheck", 576, "memcheck"), ("initcheck", 576, "initcheck")]

Run = tuple[str, int, str]  # tool, d_qk, planted fault
Report = tuple[int, str, float]  # exit status, all output, seconds
Start = Callable[[Run], Future[Report]]


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{home}/bin{os.pathsep}{home}/compute-sanitizer"
    )


def execute(sanitizer: str, run: Run, port: int) -> Report:
    tool, d_qk, fault = run
    command = [sanitizer, "--tool", tool, *OPTIONS[tool], "--kernel-name", "kernel_substring=mla_"]
    command += ["--error-exitcode", str(FOUND), "--print-limit", "10", "--port", str(port)]
    command += ["--target-processes", "application-only", "--launch-timeout", "120"]
    started = time.time()
    command += [sys.executable, str(TARGET), str(d_qk), "--started", str(started)]
    command += ["--fault", fault] if fault else []
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            env=os.environ | ENVIRONMENT,
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return -1, f"{text}\nended after {TIMEOUT} s", time.time() - started
    return done.returncode, done.stdout, time.time() - started


@pytest.fixture(scope="module")
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts a run, once. Those that the session's tests ask for are started here."""
    if not request.config.getoption("--sanitizer"):
        pytest.skip("needs --sanitizer")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit: not on PATH nor in CUDA_HOME")
    items = [item for item in request.session.items if item.get_closest_marker("sanitizer")]
    runs: list[Run] = [
        item.callspec.params["run"] for item in items if isinstance(item, pytest.Function)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        @functools.cache
        def submit(run: Run) -> Future[Report]:
            # Each process may probe ten ports from its first on.
            return pool.submit(execute, sanitizer, run, 49152 + 16 * runs.index(run))

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


@pytest.mark.sanitizer
@pytest.mark.parametrize("run", CLEAN, ids=lambda run: f"{run[0]}-d{run[1]}")
def test_finds_nothing(start: Start, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tool, d_qk, _ = run
    if not any(row.d_qk == d_qk for row in GPU_ROWS):
        pytest.skip(f"no row of the table has d_qk = {d_qk}")
    status, output = read(start, run, capsys)
    report = output[-6000:]
    assert status == 0, report
    assert SUMMARY[tool] in output, report
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
