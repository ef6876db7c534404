"""What is predicted of a prefill, and the choice between its ways by it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

Method: TypeAlias = Literal["absorbed", "expanded"]
METHODS: tuple[Method, ...] = ("absorbed", "expanded")


class Times(NamedTuple):
    """Microseconds of each request by one way."""

    gpu: float
    host: float  # to queue it, once for all replays of a graph

    def us(self, captured: bool) -> float:
        """The GPU's, or without a graph the longer of both."""
        return self.gpu if captured else max(self)


class PrefillEstimate(NamedTuple):
    """Predicted."""

    absorbed: Times | None  # None: `decode` has no kernel
    expanded: Times

    def method(self, captured: bool) -> Method:
        """The cheaper one, in a CUDA graph or without."""
        return "expanded" if self.gain_us(captured) > 0 else "absorbed"

    def gain_us(self, captured: bool) -> float:
        """What un-absorbed saves."""
        if self.absorbed is None:
            return math.inf
        return self.absorbed.us(captured) - self.expanded.us(captured)
