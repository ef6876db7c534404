"""Runs commands of `mla` in this process."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from mla.cli import main

Output: TypeAlias = pytest.CaptureFixture[str]


def command(line: str) -> int:
    """`mla LINE`, and its exit status."""
    return main(line.split())
