"""What `mla bench --prefill` measured, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mla.layer_config import Dims
from mla.models import MODELS
from mla.prefill_times import METHODS, Method, Times

from .arguments import UsageError

DIMS = MODELS["DeepSeek-V3"].dims


@dataclass(frozen=True)
class Point:
    """`new` tokens of a request behind `cached` ones: microseconds by each method."""

    heads: int
    new: int
    cached: int
    us: dict[Method, float]
    host_us: dict[Method, float]  # of the same calls
    plan_us: dict[Method, float]  # of the host, which waits for the device
    attention: str  # of the expanded way

    @property
    def dims(self) -> Dims:
        return replace(DIMS, heads=self.heads)

    def took(self, method: Method, captured: bool) -> float:
        """As prefill_estimate.Times.us."""
        return Times(self.us[method], self.host_us[method]).us(captured)


def write(path: Path, points: Iterable[Point]) -> None:
    """A JSON list with one point per line."""

    def rounded(times: dict[Method, float]) -> dict[str, float]:
        return {method: round(us, 1) for method, us in times.items()}

    lines = [
        {name: rounded(v) if isinstance(v, dict) else v for name, v in vars(p).items()}
        for p in points
    ]
    path.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n", encoding="utf-8")


def read(path: Path) -> list[Point]:
    """UsageError for a file that `write` did not write."""
    try:
        points = [Point(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        usable = all(min(p.us[m], p.host_us[m]) > 0 for p in points for m in METHODS)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: no sweep of `mla bench --prefill`: {error!r}") from None
    if not points or not usable:
        raise UsageError(f"{path}: got no times above 0")
    return points
