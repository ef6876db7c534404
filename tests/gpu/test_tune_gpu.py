"""`mla tune` on a GPU: it measures every variant that runs here, and what it writes is read."""

from __future__ import annotations

import json
from pathlib import Path

import mla
import torch
from command_line import command
from mla import dispatch, tuned
from mla.device import facts
from mla.variants import VARIANTS


def test_tune(device: torch.device, tmp_path: Path) -> None:
    here, times = facts(device), tmp_path / "times.json"
    assert command(f"tune --count 20 --repeat 1 --json {times}") == 0
    measured = {entry["variant"] for entry in json.loads(times.read_text())}
    able = {v.name for v in VARIANTS if v.d_qk == 576 and not v.unsupported_device(here)}
    assert measured == able
    path = tuned.path_of(here)
    if not path.exists():  # the constants in use chose better on these few cases
        return
    dispatch.forget()
    assert mla.explain(device=device).costs == f"tuned on this GPU ({path})"
    gpus = mla.info()["devices"][1:]
    assert any(gpu["costs"] == f"tuned on this GPU ({path})" for gpu in gpus)
