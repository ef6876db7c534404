"""Of all tests: `python -m pytest` runs what this machine can, `--slow` adds what takes long."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mla import dispatch, first_call, log
from mla.device import Device, by_name

# Small operations: threads that wait for each other cost more than they give.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take long, too")
    parser.addoption(
        "--sanitizer", action="store_true", help="run kernels under compute-sanitizer too (minutes)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="runs with --slow"))


def all_skipped(config: pytest.Config) -> bool:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return False
    return bool(reporter.stats.get("skipped")) and not any(
        reporter.stats.get(outcome) for outcome in ("passed", "failed", "error", "xfailed")
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which every test was skipped has shown nothing, so it fails."""
    if all_skipped(session.config):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and all_skipped(config):
        reporter.write_line("every test was skipped, which counts as a failure", red=True)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's own settings do not reach the tests, nor what an earlier test logged or read."""
    for name in ("MLA_VARIANT", "MLA_LOG", "MLA_VALIDATE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLA_TUNE_DIR", str(tmp_path / "tuned"))
    monkeypatch.setattr(log, "_said", set())
    dispatch.forget()


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in libcuda.so.1."""
    from fake_driver import build_driver  # needs packages that most tests do without

    folder = tmp_path_factory.mktemp("driver")
    build_driver(folder)
    return folder


@pytest.fixture
def run(fake_driver: Path, tmp_path: Path) -> Any:
    """Runs a script beside the stand-in driver: run_script."""
    from fake_driver import run_script

    return partial(run_script, driver=fake_driver, log=tmp_path / "log")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Lets CPU tensors pass for those of an A100."""
    from recording import STREAM, set_device, set_stream

    a100 = by_name("A100")
    assert a100 is not None
    set_device(monkeypatch, a100)
    set_stream(monkeypatch, STREAM)
    return a100


@pytest.fixture
def captured() -> list[int]:
    """Streams that are being captured, where launches are recorded."""
    return []


@pytest.fixture
def launches(gpu: Device, captured: list[int]) -> Iterator[Any]:
    """Launches, recorded instead of done."""
    from recording import recorded

    with recorded(captured) as seen:
        yield seen


@pytest.fixture
def firsts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each call that was looked at anew."""
    seen: list[str] = []
    real = first_call.decode

    def counted(*arguments: Any) -> Any:
        seen.append("first")
        return real(*arguments)

    monkeypatch.setattr(first_call, "decode", counted)
    return seen
