"""The command line: its options, and `mla info` and `mla explain`."""

from __future__ import annotations

import json
import subprocess
import sys

import mla
import pytest
import torch
from command_line import Output, command
from mla.cli import arguments


def test_module_runs_the_command_line() -> None:
    command = [sys.executable, "-m", "mla", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    info = json.loads(done.stdout)
    assert info["version"] == mla.__version__
    assert [row["name"] for row in info["variants"]] == [v.name for v in mla.variants()]
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["info", "explain", "check", "bench", "demo"])
def test_help(name: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as stop:
        command(f"{name} --help")
    assert stop.value.code == 0
    assert f"usage: mla {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fly",
        "explain --b 0",
        "explain --dtype int8",
        "explain --kv 5,x",
        "explain --kv -5",
        "explain --device cpu --gpu H200",
        "bench --dims 576",
        "bench --repeat none",
        "demo --steps 0",
    ],
)
def test_wrong_arguments(line: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as stop:
        command(line)
    assert stop.value.code == 2
    assert "usage: mla" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("explain --gpu Abacus", "Abacus"),
        ("explain --gpu H200 --d-qk 100", "d_qk"),
        ("explain --gpu H200 --variant none", "got 'none'"),
        ("explain --b 3 --kv 1,2", "--kv lists 2 lengths for --b 3"),
        ("check --variant none", "got 'none'"),
        ("check --device moon", "expected cpu, cuda or cuda:N"),
        ("check --device cuda:99", "GPU"),
        ("bench --device cpu --cases nowhere.json", "no such file: nowhere.json"),
        (
            "bench --device cpu --cases nowhere.json --targets none",
            "--targets none: expected one of",
        ),
        (
            "bench --device cpu --cases nowhere.json --dims 576/100",
            "--dims 576/100: expected one of 576/512",
        ),
        ("demo --device cpu --steps 100000", "the text ends"),
    ],
)
def test_wrong_requests(line: str, message: str, capsys: Output) -> None:
    assert command(line) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mla {line.split()[0]}: ")
    assert message in error


@pytest.mark.parametrize("name", ["check", "bench", "demo", "info"])
def test_without_rich(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    for module in [module for module in sys.modules if module.startswith("mla.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mla.cli.arguments", arguments)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert command(name) == 2
    assert capsys.readouterr().err == f"mla {name}: needs rich: pip install 'mla[cli]'\n"
    assert command("explain --gpu H200") == 0
    assert command("info --json") == 0


def test_info_table(capsys: Output) -> None:
    assert command("info") == 0
    printed = capsys.readouterr().out
    for variant in mla.variants():
        assert variant.name in printed
    assert mla.__version__ in printed


def test_explain_a_gpu_that_is_not_here(capsys: Output) -> None:
    assert command("explain --gpu H200 --h 16 --b 8 --kv 4096") == 0
    expected = mla.explain(device="H200", h_q=16, b=8, kv_len=4096)
    assert expected.variant is not None
    printed = capsys.readouterr().out
    assert printed == f"{expected}\n"
    assert expected.variant.name in printed


def test_explain_lengths_give_the_batch(capsys: Output) -> None:
    assert command("explain --gpu A100 --kv 17,900,0 --dtype fp16 --page-size 16") == 0
    expected = mla.explain(device="A100", b=3, kv_len=900, dtype=torch.float16, page_size=16)
    assert capsys.readouterr().out == f"{expected}\n"


def test_explain_what_cannot_run(capsys: Output) -> None:
    assert command("explain --gpu H200 --variant cpu") == 1
    assert "no variant" in capsys.readouterr().out
