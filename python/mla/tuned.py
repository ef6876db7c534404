"""The constants that `mla tune` fitted to this machine's GPUs: one file for each kind of GPU."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from . import costs_file
from .costs_file import Costs
from .device import Device

_MOST_BYTES = 1 << 20  # of a file that is read

logger = logging.getLogger("mla")


class Tuned(NamedTuple):
    path: Path
    classes: Mapping[str, Costs]


def folder() -> Path:
    """MLA_TUNE_DIR, else `mla` in the user's cache folder. It need not exist."""
    if own := os.environ.get("MLA_TUNE_DIR"):
        return Path(own)
    cache = os.environ.get("XDG_CACHE_HOME")
    # expanduser leaves the ~ where there is no home: then no such folder is found, which is right.
    return Path(cache or "~/.cache").expanduser() / "mla"


def path_of(device: Device) -> Path:
    """GPUs of one name may differ in SMs: slices of one, for instance."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", device.name)
    return folder() / f"costs-{name}-{device.sm_count}sm.json"


def load(device: Device) -> Tuned | None:
    """What was tuned for such a GPU; None if there is nothing, or nothing that can be used.

    The latter is a warning in the log, with the path, what was got and what is expected.
    """
    if device.type != "cuda":
        return None
    path = path_of(device)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return None
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f"got more than {_MOST_BYTES} bytes, expected a file of `mla tune`")
        found = costs_file.parse(content.decode(), costs_file.table_version())
        if (found.gpu, found.sm_count) != (device.name, device.sm_count):
            raise ValueError(
                f"got constants of {found.gpu} with {found.sm_count} SMs, expected {device.name} "
                f"with {device.sm_count}"
            )
    except (ValueError, RecursionError) as error:
        logger.warning("%s is ignored (`mla tune` makes a new one): %s", path, error)
        return None
    return Tuned(path, found.classes)


def save(path: Path, text: str) -> None:
    """Whole or not at all, whoever else writes or reads it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
