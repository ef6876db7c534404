"""How the modules here refuse what mla has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from ..errors import UnsupportedError


def unsupported(name: str, what: str) -> NoReturn:
    raise UnsupportedError(f"{name}: mla has no {what}, only dense decode of 16-bit caches", {})


def refuse(missing: Mapping[str, str], **given: object) -> None:
    """UnsupportedError for the first argument that is given; `missing` says what it asks for."""
    for name, value in given.items():
        if value is not None:
            unsupported(name, missing[name])
