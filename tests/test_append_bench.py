"""`mla bench --append`: what it times, what it counts, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mla
import pytest
import torch
from command_line import Output, command
from mla.cli import append_sweep
from mla.cli.append_sweep import Entry
from test_bench import FLOORS


def test_on_a_cpu(tmp_path: Path, capsys: Output) -> None:
    target = tmp_path / "append.json"
    assert command(f"bench --append --device cpu --repeat 1 --json {target}") == 0
    entries = json.loads(target.read_text())
    assert [(e["requests"], e["new"], e["rotated"]) for e in entries] == [
        (*sizes, rotated) for sizes in append_sweep.ON_CPU for rotated in (False, True)
    ]
    for e in entries:
        assert e["us"] > 0
        assert e["floor_us"] is None
    conditions = json.loads((tmp_path / "append.meta.json").read_text())
    assert conditions["method"] == "wall clock around one call"
    assert conditions["floors"] is None
    assert "append, " in capsys.readouterr().out


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("b", "new"), append_sweep.ON_CPU)
def test_counts_what_a_call_moves(
    b: int, new: int, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token at a place of its own in a page of its request, at an angle of the table."""
    calls: list[tuple[Any, ...]] = []
    call = append_sweep._call(b, new, rotated, torch.device("cpu"))
    monkeypatch.setattr(mla, "append", lambda *tensors, cos_sin: calls.append((*tensors, cos_sin)))
    call()
    ((latent, rope, cache, table, positions, angles),) = calls
    assert latent.shape[:2] == rope.shape[:2] == positions.shape == (b, new)
    assert len(table.unique()) == table.numel() == len(cache)
    assert int(positions.max()) < table.shape[1] * cache.shape[1]
    moved = 2 * (latent.nbytes + rope.nbytes) + 2 * positions.nbytes
    if rotated:
        moved += len(positions.flatten()) * angles[0].nbytes
        assert int(positions.max()) < len(angles)
    else:
        assert angles is None
    assert append_sweep.moved_bytes(b * new, rotated) == moved


def test_share_of_the_floor(capsys: Output) -> None:
    moved = append_sweep.moved_bytes(16384, rotated=False)
    floor_us = FLOORS.case_us(moved, 0)
    assert floor_us == pytest.approx(FLOORS.launch_us + moved / 4.6e6)
    entry = Entry(1, 16384, False, moved, 4 * floor_us, 20.0, floor_us)
    assert entry.gbs == pytest.approx(moved / (4 * floor_us) / 1e3)
    append_sweep.console.print(append_sweep._table(torch.device("cpu"), [entry]))
    assert "25.0" in capsys.readouterr().out
