"""The C++ compiler of this machine, for the stand-ins that tests build."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parent / "kernels"


def compile_cpp(source: Path, output: Path, *options: str | Path, kernels: Path = KERNELS) -> None:
    """The source may include what is in `kernels`."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    command = [compiler, "-std=c++17", "-I", kernels, *options, source, "-o", output]
    subprocess.run(command, check=True)
