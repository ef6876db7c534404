"""From pages in one flat list to the block table of `mla.decode`, which has a row per request."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

LEAST_ENTRIES = 1 << 18  # of a reserved table


@dataclass
class Pages:
    """The pages of b requests: a block table, or a flat list and where each request begins."""

    b: int
    longest: int  # pages of a request
    table: Tensor | None = None  # [b, longest]
    kv_indptr: Tensor | None = None  # [b + 1]
    kv_indices: Tensor | None = None  # [kv_indptr[b]]

    def as_table(self, device: torch.device) -> Tensor:
        """[b, longest] on the device. Entries behind a request's pages are undefined."""
        if self.table is not None:
            return self.table
        table = torch.empty(self.b, self.longest, dtype=torch.int32, device=device)
        self.write(table)
        return table

    def write(self, table: Tensor) -> None:
        """Into the rows of a dense table that is as wide or wider."""
        if self.table is not None:
            table[:, : self.longest].copy_(self.table)
            return
        assert self.kv_indptr is not None
        assert self.kv_indices is not None
        if self.kv_indices.numel() == 0:
            return
        rows = torch.arange(self.b, device=table.device) * table.shape[1]  # where each begins
        place = torch.repeat_interleave(
            rows - self.kv_indptr[:-1],
            self.kv_indptr.diff(),
            output_size=self.kv_indices.numel(),  # known here, so that nothing waits
        )
        place += torch.arange(self.kv_indices.numel(), device=table.device)
        table.view(-1).scatter_(0, place, self.kv_indices)


class Reserved:
    """A block table in memory that stays, beside a buffer of page ids that a caller reserved.

    Wrappers with the same buffer share it, as they share the buffer: engines have a wrapper for
    each batch size, one buffer for all of them, and plan before each replay.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        entries = max(capacity, LEAST_ENTRIES)
        self._memory = torch.empty(entries, dtype=torch.int32, device=device)

    def table(self, b: int) -> Tensor:
        """[b, width], as wide as memory allows: no request can have more pages than the buffer."""
        width = min(self._capacity, self._memory.numel() // max(b, 1))
        return self._memory[: b * width].view(b, width)


_reserved: WeakValueDictionary[tuple[torch.device, int, int], Reserved] = WeakValueDictionary()


def reserved_beside(buffer: Tensor) -> Reserved:
    """The one for a buffer, as long as a wrapper holds both."""
    key = (buffer.device, buffer.data_ptr(), buffer.numel())
    reserved = _reserved.get(key)
    if reserved is None:
        reserved = _reserved[key] = Reserved(buffer.numel(), buffer.device)
    return reserved
