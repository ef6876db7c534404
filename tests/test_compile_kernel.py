"""What the build refuses (cmake/compile_kernel.py), on reports as ptxas writes them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cmake/compile_kernel.py"
spec = importlib.util.spec_from_file_location("compile_kernel", SCRIPT)
assert spec is not None
assert spec.loader is not None
compile_kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compile_kernel)

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mla_plan' for 'sm_80'
ptxas info    : Function properties for mla_plan
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 264 bytes smem, 416 bytes cmem[0]
"""
LOSS = "ptxas info    : (C%d) Potential Performance Loss: %s\n"


def test_a_clean_report_passes() -> None:
    assert compile_kernel.refusals(CLEAN) == []


@pytest.mark.parametrize(
    "line",
    [
        LOSS % (7508, "'setmaxnreg' ignored; unable to determine register count at entry."),
        LOSS % (7510, "wgmma.mma_async instructions are serialized due to a function call."),
        LOSS % (7519, "warpgroup.arrive is injected in around line 7 by the compiler."),
        "    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n",
        "    0 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads\n",
    ],
)
def test_what_is_refused_is_named(line: str) -> None:
    assert compile_kernel.refusals(CLEAN + line + CLEAN) == [line.rstrip("\n")]


PTX = '.version 9.0\n.target sm_80\n\t.pragma "used_bytes_mask 15";\n\t.pragma "nounroll";\n'


def test_the_version_is_lowered_and_its_hints_go() -> None:
    lowered = '.version 8.0\n.target sm_80\n\t.pragma "nounroll";\n'
    assert compile_kernel.lower_version(PTX, "8.0") == lowered


@pytest.mark.parametrize("limit", ["9.0", "9.5", "10.1"])
def test_a_version_that_is_low_enough_is_kept(limit: str) -> None:
    assert compile_kernel.lower_version(PTX, limit) == PTX


def test_text_that_is_not_ptx_is_an_error() -> None:
    with pytest.raises(SystemExit, match=r"without a \.version"):
        compile_kernel.lower_version("", "8.0")
