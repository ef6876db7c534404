"""Runs compute-sanitizer, and reads what racecheck says."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

SANITIZER_PACKAGE = "nvidia-cuda-sanitizer-api"
NVCC_PACKAGE = "nvidia-cuda-nvcc"
TIMEOUT = 400  # seconds a process
FOUND = 86  # exit status when the tool has found something
PRINTED = 1000  # findings at most; those that are left out must all be seen
ENVIRONMENT = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # one cudaMalloc a tensor, no reuse
    "OMP_NUM_THREADS": "1",  # as many processes as cores run at a time
}
TOOLS = {
    "memcheck": ["--padding", "512", "--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "analysis"],
    "initcheck": [],
    "synccheck": [],
}

Report = tuple[int, str, float]  # exit status, all output, seconds


def of_package(name: str, package: str) -> str | None:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = (file for file in files if (file.parent.name, file.name) == ("bin", name))
    return next((str(file.locate()) for file in found), None)


def of_toolkit(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(
        name, path=f"{home}/bin{os.pathsep}{home}/compute-sanitizer"
    )


def needed(name: str, package: str) -> str:
    """Of the package from PyPI if it is installed, else of a CUDA toolkit."""
    path = of_package(name, package) or of_toolkit(name)
    if path is None:
        pytest.skip(f"needs {name}: not on PATH, in CUDA_HOME or installed by {package}")
    return path


def execute(sanitizer: str, tool: str, kernels: str, port: int, target: list[str]) -> Report:
    command = [sanitizer, "--tool", tool, *TOOLS[tool]]
    command += ["--kernel-name", f"kernel_substring={kernels}", "--port", str(port)]
    command += ["--error-exitcode", str(FOUND), "--print-limit", str(PRINTED)]
    command += ["--target-processes", "application-only", "--launch-timeout", "120"]
    started = time.time()
    command += [sys.executable, *target]
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


def races(output: str) -> list[set[str]]:
    """The kernels of each race that racecheck reports: those of its two or more accesses."""
    found = re.findall(r"Race reported between .*\n(?:=+ +and .*\n)*", output)
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", output)
    assert summary is not None, output[-6000:]
    assert int(summary[1]) == len(found), output[-6000:]
    return [set(re.findall(r"access at (\w+)\+0x", race)) for race in found]
