"""What goes wrong besides the caller's mistakes, which are `ValueError` and `TypeError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._mla import CudaError

__all__ = ["CudaError", "UnsupportedError"]


class UnsupportedError(NotImplementedError):
    """No variant can run the problem on the device, or the forced one cannot.

    `reasons` maps the name of every variant to what speaks against it.
    """

    def __init__(self, headline: str, reasons: Mapping[str, Sequence[str]]) -> None:
        self.reasons = {name: list(why) for name, why in reasons.items()}
        lines = [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        super().__init__("\n".join([headline, *lines]))
