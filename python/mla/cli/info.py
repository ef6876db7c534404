"""`mla info`: what is installed, and what of it runs here."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import mla
from mla.checks import DTYPES


def run(args: Namespace) -> int:
    info = mla.info()
    if args.json:
        print(json.dumps(info, indent=1))
    else:
        _print(info)
    return 0


def _print(info: dict[str, Any]) -> None:
    from .console import console, make_table

    about = make_table(f"mla {info['version']}", "", "")
    about.show_header = False
    about.add_row("torch", info["torch"])
    for key, value in info["build"].items():
        if key != "version":
            about.add_row(key.replace("_", " "), value)
    driver = info["driver"]
    about.add_row("driver", driver["problem"] or f"CUDA {_cuda_version(driver['version'])}")
    for workspace in info["workspaces"]:
        about.add_row("workspace", ", ".join(f"{key} {value}" for key, value in workspace.items()))
    console.print(about)

    devices = make_table("devices", "name", "sm", "SMs", "shared memory", "constants")
    for device in info["devices"]:
        gpu = device["sm"] > 0
        sizes = (str(device["sm"]), str(device["sm_count"]), f"{device['smem_optin'] // 1024} KB")
        devices.add_row(
            device["name"], *(sizes if gpu else ("-", "-", "-")), device["costs"] or "-"
        )
    console.print(devices)

    names = [device["name"] for device in info["devices"]]
    columns = ("dtypes", "d_qk/d_v", "rows", "tokens", "stages", "smem", "images")
    variants = make_table("variants", "variant", *columns, *names)
    for variant in info["variants"]:
        on_host = variant["targets"] == "host"
        variants.add_row(
            variant["name"],
            ", ".join(DTYPES.values() if on_host else variant["dtypes"]),
            "any" if on_host else f"{variant['d_qk']}/{variant['d_v']}",
            *("-" if on_host else str(variant[key]) for key in ("block_rows", "block_n", "stages")),
            "-" if on_host else f"{variant['smem_bytes'] / 1024:.0f} KB",
            variant["targets"],
            *("; ".join(d["variants"][variant["name"]]) or "runs" for d in info["devices"]),
        )
    console.print(variants)


def _cuda_version(version: int) -> str:
    """13000 -> 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"
