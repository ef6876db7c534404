"""The kernel that only reads: what a stand-in driver is asked for."""

from __future__ import annotations

import re
from typing import Any

import pytest
from mla import _mla


def test_the_launch(run: Any) -> None:
    done = run("_mla.launch_stream(0x1000, 160, 0x2004, 528, 1, 0xabc)")
    (launch,) = done.named("launch")
    assert (launch["kernel"], launch["grid"], launch["block"]) == ("mla_stream", 528, 512)
    assert (launch["stream"], launch["device"]) == (0xABC, 1)
    numbers = [int.from_bytes(bytes.fromhex(p)[:8], "little") for p in launch["parameters"]]
    assert numbers == [0x1000, 10, 0x2004]


@pytest.mark.parametrize(
    ("address", "size", "ctas", "message"),
    [
        (0x1008, 160, 1, "multiples of 16"),
        (0x1000, 168, 1, "multiples of 16"),
        (0x1000, -16, 1, "multiples of 16"),
        (0x1000, 160, 0, "ctas must be positive"),
    ],
)
def test_what_is_refused(address: int, size: int, ctas: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _mla.launch_stream(address, size, 0x2000, ctas, 0, 0)


@pytest.mark.parametrize("launches", [0, 4])
def test_no_call_has_so_many_launches(launches: int) -> None:
    with pytest.raises(ValueError, match="launches must be 1 to 3"):
        _mla.queue_empty(launches, 0, 0)
