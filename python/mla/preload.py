"""Loading kernels before the first call needs them."""

from __future__ import annotations

import torch

from . import _mla
from .device import as_torch, current, facts
from .dispatch import forced
from .errors import UnsupportedError
from .variants import VARIANTS


def preload(
    device: torch.device | str | int | None = None, variant: str | None = None
) -> tuple[str, ...]:
    """Loads kernels onto a CUDA device now, so that no first call waits for them.

    device: the current one if None. On a CPU there is nothing to load.
    variant: a pipeline or a variant, all that run on the device if None.

    Returns the names of the variants. ValueError for a device or a variant that there is not,
    UnsupportedError if none of them runs on the device.
    """
    target = current() if device is None else as_torch(device)
    device_facts = facts(target)
    request = forced(variant) if variant else None
    reasons = {
        v.name: v.unsupported_device(device_facts)
        for v in VARIANTS
        if request is None or request.admits(v)
    }
    names = tuple(name for name, why_not in reasons.items() if not why_not)
    if not names:
        raise UnsupportedError(f"nothing to load runs on {device_facts}", reasons)
    if target.type != "cuda":
        return ()
    for name in names:
        _mla.preload(target.index, name)
    return names
