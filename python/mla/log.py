"""MLA_LOG=dispatch: says once per device, variant and kind of problem what was chosen.

The line goes to the logger "mla" at level INFO. If nothing else would show it, because the program
has not configured logging, a handler is added that writes to stderr.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

from . import _mla

logger = logging.getLogger("mla")
_said: set[Hashable] = set()


def dispatch_wanted() -> bool:
    return _mla.logs_dispatch()


def once(key: Hashable, message: Callable[[], str]) -> None:
    if key in _said:
        return
    _said.add(key)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET and not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    logger.info(message())
