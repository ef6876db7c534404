"""Launches, recorded in place of the driver's: CPU tensors pass for those of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mla import _mla, first_call
from mla.device import Device

STREAM = 77
FIELDS = [name for name in dir(_mla.DecodeParams) if not name.startswith("_")]


@dataclass
class Launch:
    kind: str  # "plan" or "decode"
    variant: str
    dtype: str
    stream: int
    params: dict[str, Any]  # as they were
    behind_planner: bool = False


def set_device(patch: pytest.MonkeyPatch, device: Device) -> None:
    """Makes it the device of all tensors."""
    for module in (first_call, sys.modules["mla.plan"]):
        patch.setattr(module, "facts", lambda _: device)


def set_stream(patch: pytest.MonkeyPatch, stream: int) -> None:
    """Makes it torch's current one."""
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: stream, raising=False)


@contextmanager
def recorded(captured: list[int]) -> Iterator[list[Launch]]:
    """The launches to come, none of which is done. `captured`: streams that are being captured."""
    seen: list[Launch] = []

    def snapshot(params: _mla.DecodeParams) -> dict[str, Any]:
        return {name: getattr(params, name) for name in FIELDS}

    def launch_plan(variant: str, params: _mla.DecodeParams, device: int, stream: int) -> None:
        seen.append(Launch("plan", variant, "", stream, snapshot(params)))

    def launch_decode(
        variant: str,
        dtype: str,
        params: _mla.DecodeParams,
        plans: bool,
        device: int,
        stream: int,
    ) -> None:
        if plans:
            launch_plan(variant, params, device, stream)
        seen.append(Launch("decode", variant, dtype, stream, snapshot(params), plans))

    _mla.forget()
    _mla.redirect(launch_plan, launch_decode, lambda device, stream: stream in captured)
    try:
        yield seen
    finally:
        _mla.redirect(None, None, None)
        _mla.forget()
