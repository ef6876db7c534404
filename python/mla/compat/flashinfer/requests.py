"""Requests as `decode` takes them, and what is read of them on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_index, check_tensor, wrong
from .metadata import CSR, DENSE, MLAPlanMetadata
from .pages import Pages


class Step(NamedTuple):
    """What `decode` reads of the requests of a plan."""

    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor


class Requests(NamedTuple):
    """Of a plan, checked; tensors on the wrapper's device."""

    total_q: int  # query tokens of all
    longest: int  # KV tokens of a request
    cu_seqlens_q: Tensor  # [b + 1]
    seq_lens: Tensor  # [b]
    pages: Pages

    def step(self, device: torch.device) -> Step:
        return Step(self.pages.as_table(device), self.seq_lens, self.cu_seqlens_q)


def read(given: MLAPlanMetadata, page_size: int, device: torch.device) -> Requests:
    """Waits for the device if offsets or lengths are on it. Page ids stay where they are."""
    dense = any(getattr(given, name) is not None for name in DENSE)
    names = DENSE if dense else CSR
    cuts_name, lens_name = names[0], names[-1]
    tensors = {name: getattr(given, name) for name in names}
    missing = [name for name, tensor in tensors.items() if tensor is None]
    if missing:
        raise wrong("metadata", f"no {', '.join(missing)}", f"all of {', '.join(names)}")
    _check(lens_name, tensors[lens_name], (None,), device, "[b]")
    b = tensors[lens_name].shape[0]
    _check(cuts_name, tensors[cuts_name], (b + 1,), device, "[{}], b + 1")
    cuts, lens = tensors[cuts_name], tensors[lens_name]
    if dense:
        table = tensors["block_tables"]
        _check("block_tables", table, (b, None), device, "[{}, max_pages]")
        cuts_here, lens_here = _on_host(cuts, lens)
        counts = torch.full((b,), table.shape[1])
        width = -(-int(lens_here.clamp(min=0).max()) // page_size) if b else 0
        pages = Pages(b, width, table=to_device(table[:, :width], device))
    else:
        starts, ids = tensors["kv_indptr"], tensors["kv_indices"]
        _check("kv_indptr", starts, (b + 1,), device, "[{}], b + 1")
        _check("kv_indices", ids, (None,), device, "[pages]")
        cuts_here, lens_here, starts_here = _on_host(cuts, lens, starts)
        total = _last("kv_indptr", starts_here)
        if total > ids.shape[0]:
            raise wrong("kv_indices", f"{ids.shape[0]} pages", f"kv_indptr[{b}] = {total} or more")
        counts = starts_here.diff()
        pages = Pages(
            b,
            int(counts.max()) if b else 0,
            kv_indptr=to_device(starts, device),
            kv_indices=to_device(ids[:total], device),
        )
    _check_reach(lens_name, lens_here, counts, page_size)
    total_q, longest = _last(cuts_name, cuts_here), int(lens_here.max()) if b else 0
    return Requests(total_q, longest, to_device(cuts, device), to_device(lens, device), pages)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without a wait: what a copy may still be reading is not the caller's."""
    return tensor if tensor.device == device else tensor.clone().to(device, non_blocking=True)


def _check(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device, layout: str
) -> None:
    check_tensor(name, tensor)
    here = tensor.device if tensor.device.type == "cpu" else device
    check_index(name, tensor, shape, here, layout)


def _on_host(*tensors: Tensor) -> list[Tensor]:
    """Their values, brought by one copy."""
    remote = [t for t in tensors if t.device.type != "cpu"]
    if not remote:
        return list(tensors)
    arrived = iter(torch.split(torch.cat(remote).cpu(), [t.numel() for t in remote]))
    return [t if t.device.type == "cpu" else next(arrived) for t in tensors]


def _last(name: str, offsets: Tensor) -> int:
    """Of offsets from 0 on, that do not fall."""
    if int(offsets[0]) != 0:
        raise wrong(f"{name}[0]", int(offsets[0]), 0)
    falls = (offsets.diff() < 0).nonzero()
    if len(falls):
        i = int(falls[0]) + 1
        raise wrong(f"{name}[{i}]", int(offsets[i]), f"at least {int(offsets[i - 1])}")
    return int(offsets[-1])


def _check_reach(name: str, lens: Tensor, counts: Tensor, page_size: int) -> None:
    reach = counts.long() * page_size
    bad = ((lens < 0) | (lens > reach)).nonzero()
    if len(bad):
        i = int(bad[0])
        pages = f"its {int(counts[i])} pages of {page_size}"
        raise wrong(f"{name}[{i}]", int(lens[i]), f"0 to {int(reach[i])}, the tokens of {pages}")
