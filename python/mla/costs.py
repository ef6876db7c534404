"""What limits the variants on a GPU: constants measured there, or derived from published figures.

The first of these that exists counts: the file that `mla tune` wrote on this machine, the built-in
one of the GPU (data/costs.json), a prediction from the built-in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

from . import costs_file, tuned
from .costs_file import Costs
from .device import Device, by_name
from .variants import Variant

# Of the peak of its products (wgmma's or mma.sync's), by packed rows of a tile: what a pipeline can
# reach. ldmatrix feeds warp tiles of 16, 32 and 64 rows every 2.5, 2.05 and 1.6 cycles where the
# H200 could take one every 1.5; less an estimated fifth to third for softmax. cuBLAS reaches 0.80
# of wgmma's peak.
PEAK_SHARE = {
    "sm80": {16: 0.40, 32: 0.55, 64: 0.75},
    "sm90_2wg": {64: 0.80},
    "sm90_3wg": {64: 0.80},
    "sm90_swap": {16: 0.40},
}
# The peak of data-center GPUs since Hopper is wgmma's; mma.sync has 0.66 of it on the H200.
WGMMA_GPUS = (90, 100, 103, 110)
WGMMA_PIPELINES = ("sm90_2wg", "sm90_3wg", "sm90_swap")
MMA_PER_WGMMA = 0.66


class GpuCosts(NamedTuple):
    """The constants of one GPU, and where they come from."""

    source: str  # one clause
    classes: Mapping[str, Costs]  # by `class_name`


def class_name(variant: Variant) -> str:
    """Variants of one class share their constants."""
    return f"{variant.pipeline}.{variant.targets}"


@lru_cache(maxsize=64)
def of(device: Device) -> GpuCosts:
    """The constants for a GPU. Reads files once per device and process.

    A tuned file that cannot be used is left out with a warning in the log.
    """
    if own := tuned.load(device):
        return GpuCosts(f"tuned on this GPU ({own.path})", own.classes)
    name, sm_count, classes = built_in()
    known = by_name(device.name)
    if known and (known.name, device.sm_count) == (name, sm_count):
        return GpuCosts(f"measured on an {name}", classes)
    figures = "published figures" if known else "the number of SMs"
    return GpuCosts(
        f"predicted from {figures}; never measured here", derived(device, name, classes)
    )


@lru_cache(maxsize=1)
def built_in() -> tuple[str, int, Mapping[str, Costs]]:
    """Name and SM count of the GPU that was measured, and its constants.

    They are for any table of variants that has the same classes and tiles.
    """
    text = resources.files("mla.data").joinpath("costs.json").read_text(encoding="utf-8")
    found = costs_file.parse(text, table=None)
    return found.gpu, found.sm_count, found.classes


def derived(device: Device, name: str, classes: Mapping[str, Costs]) -> dict[str, Costs]:
    """A prediction from bandwidth, MMA rate and SM count: what does not follow from these stays.

    Memory goes with the bandwidth, merging, which is done in L2, with the SMs. A step of a worker
    takes as long as on the GPU measured, unless the peak of this one is the limit.
    """
    measured = by_name(name)
    assert measured is not None
    faster = device.bandwidth / measured.bandwidth

    def scaled(key: str, costs: Costs) -> Costs:
        pipeline = key.partition(".")[0]
        peak = device.tflops / max(device.sm_count, 1)
        if device.sm in WGMMA_GPUS and pipeline not in WGMMA_PIPELINES:
            peak *= MMA_PER_WGMMA
        return costs._replace(
            bandwidth_gbs=costs.bandwidth_gbs * faster,
            merge_gbs=costs.merge_gbs * device.sm_count / measured.sm_count,
            tflops_per_sm={
                rows: min(rate, peak * PEAK_SHARE[pipeline][rows])
                for rows, rate in costs.tflops_per_sm.items()
            },
        )

    return {key: scaled(key, costs) for key, costs in classes.items()}


def forget() -> None:
    """Files are read again."""
    of.cache_clear()
