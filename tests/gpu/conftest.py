"""Tests that need a GPU: `python -m pytest tests/gpu`. Without one each says what is missing.

`python -m pytest tests/gpu --sanitizer` adds the runs under compute-sanitizer, a few minutes.
Tests with an argument `row` run once for every GPU row of the table of variants.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # cases, compare, running

from mla import _mla
from mla.device import resolve
from running import GPU_ROWS

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sanitizer: runs under compute-sanitizer, with --sanitizer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.iter_markers("parametrize")
    if "row" in metafunc.fixturenames and not any("row" in mark.args[0] for mark in marks):
        metafunc.parametrize("row", GPU_ROWS, ids=lambda row: row.name)


@functools.cache
def missing() -> str:
    """What these tests need and this machine lacks; empty if nothing."""
    if torch.version.cuda is None:
        return "needs a GPU: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"needs a GPU: {_mla.driver_problem() or 'torch sees none'}"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or later: this one has {major}.{minor}"
    return _mla.driver_problem()


@pytest.fixture(scope="session", autouse=True)
def needs_gpu() -> None:
    if missing():
        pytest.skip(missing())


@pytest.fixture(autouse=True)
def needs_gpu_of_the_row(request: pytest.FixtureRequest) -> None:
    row = request.node.callspec.params.get("row") if hasattr(request.node, "callspec") else None
    if row is not None:
        reasons = row.unsupported_device(resolve(None))
        if reasons:
            pytest.skip(f"{row.name} {'; '.join(reasons)}")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of the variants that were launched in this test, in order."""
    names: list[str] = []

    def record(variant: str, *args: Any) -> None:
        names.append(variant)
        _mla.launch_decode(variant, *args)

    _mla.redirect(_mla.launch_plan, record, _mla.capturing)
    yield names
    _mla.redirect(None, None, None)
