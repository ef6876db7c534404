"""The table of variants (kernels/variants.inc) as Python sees it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from . import _mla
from .checks import DTYPES
from .device import KIB, Device
from .problem import Kind


@dataclass(frozen=True)
class Variant:
    """One row of the table: a kernel and the limits of what it runs."""

    name: str
    pipeline: str
    dtypes: tuple[str, ...]
    d_qk: int
    d_v: int
    block_rows: int  # packed query rows (token, head) per CTA
    block_n: int  # KV tokens per tile
    stages: int  # tiles of KV in shared memory
    warps: int
    smem_bytes: int
    page_multiple: int  # page sizes are multiples of this
    targets: str  # what the image holds
    smem_limit: int  # bytes that a CTA may have on the smallest GPU that the image is for
    min_sm: int
    exact_sm: bool  # runs on min_sm alone
    merges_pairs: bool  # a result that two workers share is merged by one of them

    @property
    def on_host(self) -> bool:
        """Runs in torch on the CPU; all limits are void."""
        return self.targets == "host"

    def unsupported_device(self, device: Device) -> list[str]:
        """Why it cannot run on the device; empty if it can."""
        if self.on_host:
            return [] if device.type == "cpu" else [f"runs on cpu tensors, not on {device.type}"]
        if device.type != "cuda":
            return [f"runs on cuda tensors, not on {device.type}"]
        reasons = []
        if device.problem:
            reasons.append(device.problem)
        if self.exact_sm and device.sm != self.min_sm:
            reasons.append(f"needs sm_{self.min_sm}, the GPU is sm_{device.sm}")
        elif device.sm < self.min_sm:
            reasons.append(f"needs sm_{self.min_sm} or later, the GPU is sm_{device.sm}")
        if self.smem_bytes > device.smem_optin:
            need, have = self.smem_bytes / KIB, device.smem_optin / KIB
            reasons.append(f"needs {need:.0f} KB of shared memory, the GPU has {have:.0f} KB")
        return reasons

    def unsupported(self, kind: Kind, device: Device) -> list[str]:
        """Why it cannot run such problems on the device; empty if it can."""
        reasons = self.unsupported_device(device)
        if self.on_host or device.type != "cuda":
            return reasons
        if DTYPES[kind.dtype] not in self.dtypes:
            reasons.append(f"has {' and '.join(self.dtypes)}, not {DTYPES[kind.dtype]}")
        if (kind.d_qk, kind.d_v) != (self.d_qk, self.d_v):
            reasons.append(
                f"is for d_qk = {self.d_qk}, d_v = {self.d_v}, not {kind.d_qk}, {kind.d_v}"
            )
        if kind.page_size % self.page_multiple:
            reasons.append(
                f"needs pages of a multiple of {self.page_multiple} tokens, not {kind.page_size}"
            )
        return reasons


def _read_table() -> tuple[Variant, ...]:
    columns = [field.name for field in fields(Variant)]
    return tuple(Variant(**{column: row[column] for column in columns}) for row in _mla.variants())


VARIANTS = _read_table()  # in the order of the table: among equals, earlier rows win


def variants() -> tuple[Variant, ...]:
    """All variants, in the order of the table."""
    return VARIANTS
