"""What the choice of a variant needs to know about a device."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

from . import _mla

KIB = 1024


@dataclass(frozen=True)
class Device:
    """Facts about a device. `bandwidth` in GB/s, `tflops` dense bf16 with float32 accumulation."""

    name: str
    type: str  # of torch.device
    sm: int = 0  # compute capability, 80 for 8.0
    sm_count: int = 0
    smem_optin: int = 0  # bytes of shared memory that one CTA may have
    bandwidth: float = 0.0
    tflops: float = 0.0
    problem: str = ""  # why nothing can be launched on it

    def __hash__(self) -> int:  # quickly: choices are looked up by it
        return hash((self.name, self.sm_count))

    def __str__(self) -> str:
        if self.type != "cuda":
            return self.name
        return f"{self.name} (sm_{self.sm}, {self.sm_count} SMs, {self.smem_optin // KIB} KB)"


CPU = Device("cpu", "cpu")


def _gpu(
    name: str, sm: int, sm_count: int, smem_kib: int, bandwidth: float, tflops: float
) -> Device:
    return Device(name, "cuda", sm, sm_count, smem_kib * KIB, bandwidth, tflops)


# From the vendor's data sheets; where several match, the first counts.
KNOWN = (
    _gpu("A100-SXM4-80GB", 80, 108, 163, 2039, 312),
    _gpu("A100 80GB PCIe", 80, 108, 163, 1935, 312),
    _gpu("A100", 80, 108, 163, 1555, 312),
    _gpu("A30", 80, 56, 163, 933, 165),
    _gpu("A10G", 86, 80, 99, 600, 70),
    _gpu("A10", 86, 72, 99, 600, 125),
    _gpu("RTX A6000", 86, 84, 99, 768, 155),
    _gpu("RTX 3090", 86, 82, 99, 936, 71),
    _gpu("L40S", 89, 142, 99, 864, 362),
    _gpu("L4", 89, 58, 99, 300, 121),
    _gpu("RTX 4090", 89, 128, 99, 1008, 165),
    _gpu("H100 PCIe", 90, 114, 227, 2039, 756),
    _gpu("H100", 90, 132, 227, 3352, 989),
    _gpu("H200", 90, 132, 227, 4800, 989),
    _gpu("H20", 90, 78, 227, 4000, 148),
    _gpu("RTX 5090", 120, 170, 99, 1792, 209),
)

# Shared memory per CTA by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications"), for versions of torch whose device properties lack it.
SMEM_OPTIN_KIB = {
    75: 64,
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    110: 227,
    120: 99,
    121: 99,
}
SMEM_OPTIN_KIB_OTHERWISE = 99  # the least since sm_80

# For GPUs that KNOWN lacks: what one SM of the H200 gets and does.
BANDWIDTH_PER_SM = 4800 / 132
TFLOPS_PER_SM = 989 / 132


def by_name(name: str) -> Device | None:
    """The known GPU whose name is a word in `name` or the reverse: "NVIDIA H200", "3090"."""

    def has(text: str, word: str) -> bool:
        return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None

    found = [known for known in KNOWN if has(name, known.name)] or [
        known for known in KNOWN if has(known.name, name)
    ]
    return found[0] if found else None


@functools.cache
def facts(device: torch.device) -> Device:
    """Of the device of a tensor. Asks torch once per device; initialises CUDA for a CUDA device."""
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        return Device(str(device), device.type)
    properties = torch.cuda.get_device_properties(device)
    sm = properties.major * 10 + properties.minor
    default_smem = SMEM_OPTIN_KIB.get(sm, SMEM_OPTIN_KIB_OTHERWISE) * KIB
    sm_count = properties.multi_processor_count
    known = by_name(properties.name)
    return Device(
        name=properties.name,
        type="cuda",
        sm=sm,
        sm_count=sm_count,
        smem_optin=getattr(properties, "shared_memory_per_block_optin", default_smem),
        bandwidth=known.bandwidth if known else sm_count * BANDWIDTH_PER_SM,
        tflops=known.tflops if known else sm_count * TFLOPS_PER_SM,
        problem=_mla.driver_problem(),
    )


def resolve(device: Device | torch.device | str | int | None) -> Device:
    """The facts of a device given in any way; None is the current GPU, or the CPU without one."""
    if isinstance(device, Device):
        return device
    if device is None:
        device = current()
    if isinstance(device, str) and (known := by_name(device)):
        return known
    names = ", ".join(known.name for known in KNOWN)
    return facts(as_torch(device, f"a torch device or one of {names}"))


def as_torch(device: torch.device | str | int, expected: str = "a torch device") -> torch.device:
    """With its index. ValueError for a name that torch does not know, or of what is not here."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected {expected}") from None
    return indexed(found)


def current() -> torch.device:
    return indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def indexed(device: torch.device) -> torch.device:
    """A CUDA device with its index, which torch leaves out for the current one."""
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        problem = _mla.driver_problem() or "torch sees no GPU"
        raise ValueError(f"device: got {device}, expected one that is here: {problem}")
    found = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    count = torch.cuda.device_count()
    if found.index >= count:
        raise ValueError(f"device: got {found}, expected one that is here: torch sees {count}")
    return found
