"""What limits both ways of prefill on a GPU: constants measured there, or derived from others.

`mla fit --prefill` writes the file, data/prefill_costs.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

from .costs import MMA_PER_WGMMA, WGMMA_GPUS
from .costs_file import four_digits
from .device import Device, by_name

FORMAT = 2


class PrefillCosts(NamedTuple):
    """Of one GPU and its host. Rates are those of all its SMs."""

    absorbed_us: float  # of a step without work: launches before and behind `decode`
    decode_factor: float  # of what is predicted for `decode`, whose constants know few query tokens
    expanded_us: float  # of a call without work
    chunk_us: float  # each chunk: launches that make its keys and values
    attention_us: float  # each attention: its launch, its query's, a merge's
    product_tflops: float
    memory_gbs: float
    cudnn_tflops: float
    flash_tflops: float
    # Of the host, where no graph is captured.
    absorbed_host_us: float  # a step
    expanded_host_us: float  # a call, and beside that:
    chunk_host_us: float
    attention_host_us: float
    planning_us: float  # lengths read and a plan made, while the GPU waits


class GpuPrefillCosts(NamedTuple):
    """The constants of one GPU, and where they come from."""

    source: str  # one clause
    costs: PrefillCosts


class PrefillCostsFile(NamedTuple):
    gpu: str
    sm_count: int
    costs: PrefillCosts


@lru_cache(maxsize=64)
def of(device: Device) -> GpuPrefillCosts:
    """The constants for a GPU."""
    found = built_in()
    known = by_name(device.name)
    if known and (known.name, device.sm_count) == (found.gpu, found.sm_count):
        return GpuPrefillCosts(f"measured on an {found.gpu}", found.costs)
    figures = "published figures" if known else "the number of SMs"
    return GpuPrefillCosts(f"predicted from {figures}; never measured here", derived(device, found))


@lru_cache(maxsize=1)
def built_in() -> PrefillCostsFile:
    """Of the GPU that was measured."""
    path = resources.files("mla.data").joinpath("prefill_costs.json")
    return parse(path.read_text(encoding="utf-8"))


def derived(device: Device, found: PrefillCostsFile) -> PrefillCosts:
    """A prediction: rates go with the peaks, launches and the host stay. Products and cuDNN use a
    GPU's fastest instructions, torch's flash attention mma.sync."""
    measured = by_name(found.gpu)
    assert measured is not None
    costs, faster = found.costs, device.tflops / measured.tflops
    return costs._replace(
        product_tflops=costs.product_tflops * faster,
        memory_gbs=costs.memory_gbs * device.bandwidth / measured.bandwidth,
        cudnn_tflops=costs.cudnn_tflops * faster,
        flash_tflops=costs.flash_tflops * _mma_peak(device) / _mma_peak(measured),
    )


def _mma_peak(device: Device) -> float:
    return device.tflops * (MMA_PER_WGMMA if device.sm in WGMMA_GPUS else 1.0)


def dump(gpu: str, sm_count: int, costs: PrefillCosts, made: Mapping[str, object]) -> str:
    """`made`: when, how and from what; nobody reads it but people."""
    rounded = {name: four_digits(value) for name, value in costs._asdict().items()}
    content = {
        "format": FORMAT, "gpu": gpu, "sm_count": sm_count, "made": dict(made), "costs": rounded,
    }  # fmt: skip
    return json.dumps(content, indent=1) + "\n"


def parse(text: str) -> PrefillCostsFile:
    """ValueError, with what was got and what is expected, unless all of it can be used."""
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise ValueError(f"format: got {content['format']}, expected {FORMAT}")
    found = content["costs"]
    if found.keys() != set(PrefillCosts._fields):
        got, expected = ", ".join(found), ", ".join(PrefillCosts._fields)
        raise ValueError(f"costs: got {got}, expected {expected}")
    for name, value in found.items():
        if not 0 < value < sys.float_info.max:
            raise ValueError(f"{name}: got {value}, expected a number above 0")
    return PrefillCostsFile(content["gpu"], content["sm_count"], PrefillCosts(**found))
