"""What is installed and what it can do here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from . import _mla, costs
from . import workspace as workspaces
from .device import CPU, facts
from .variants import VARIANTS


def version() -> str:
    return _mla.build_info()["version"]


def info() -> dict[str, Any]:
    """Of plain values, ready for json.dumps; needs no GPU.

    version, torch; build: how the wheel was built; driver: version (0 without one) and problem (""
    if it is usable);
    devices: name, sm, sm_count, smem_optin (bytes), costs (where the constants of predictions come
    from; "" on a CPU) and variants, which maps each name to why it does not run there (empty if it
    does); variants: the table; workspaces: device, stream and bytes of what is kept.
    """
    devices = [CPU]
    if torch.cuda.is_available():
        devices += [facts(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return {
        "version": version(),
        "torch": torch.__version__,
        "build": dict(_mla.build_info()),
        "driver": {"version": _mla.driver_version(), "problem": _mla.driver_problem()},
        "devices": [
            {
                "name": device.name,
                "sm": device.sm,
                "sm_count": device.sm_count,
                "smem_optin": device.smem_optin,
                "costs": costs.of(device).source if device.type == "cuda" else "",
                "variants": {
                    variant.name: variant.unsupported_device(device) for variant in VARIANTS
                },
            }
            for device in devices
        ],
        "variants": [asdict(variant) for variant in VARIANTS],
        "workspaces": workspaces.sizes(),
    }
