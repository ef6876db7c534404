"""Scratch memory of the launches: a schedule and the partial results of split requests.

    schedule  32 + 80 * num_workers + 32 * row_blocks + 12 * (b + 1) bytes, rounded up to 256;
              none with a plan
    partials  2 * num_workers * block_rows * (d_v + 1) * 4 bytes

num_workers is the number of SMs; row_blocks is b * ceil(s_q * h_q / block_rows), of a ragged query
ceil(total_q * h_q / block_rows) + b. One buffer is kept for each device and stream, as calls on a
stream follow each other; a captured graph gets buffers of its own from torch's pool of that graph.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from . import _mla
from .checks import check_tensor, shape_of, wrong
from .problem import Problem
from .variants import Variant

SCHEDULE_ALIGNMENT = 256


class Workspace:
    """The kept buffer of one stream. A call holds `lock` until all its launches are queued."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.buffer: Tensor | None = None

    def reserve(self, num_bytes: int, device: torch.device) -> Tensor:
        if self.buffer is None or self.buffer.numel() < num_bytes:
            self.buffer = None  # lets torch reuse the memory for what comes next
            self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        return self.buffer


_kept: defaultdict[tuple[int, int], Workspace] = defaultdict(Workspace)


def kept(device: int, stream: int) -> Workspace:
    return _kept[device, stream]


def sizes() -> list[dict[str, Any]]:
    """What is kept, in bytes, by device index and stream handle."""
    return [
        {"device": device, "stream": stream, "bytes": space.buffer.numel()}
        for (device, stream), space in list(_kept.items())
        if space.buffer is not None
    ]


def schedule_bytes(variant: Variant, params: _mla.DecodeParams) -> int:
    """Of the schedule that `params` asks for; only their sizes count."""
    size = _mla.plan_bytes(variant.name, params)
    return -(-size // SCHEDULE_ALIGNMENT) * SCHEDULE_ALIGNMENT


def bytes_needed(variant: Variant, problem: Problem, num_workers: int, has_plan: bool) -> int:
    """By a decode call."""
    if variant.on_host:
        return 0
    params = _mla.DecodeParams()
    set_sizes(params, problem, num_workers)
    schedule = 0 if has_plan else schedule_bytes(variant, params)
    return schedule + variant.workspace_bytes(num_workers)


def set_sizes(params: _mla.DecodeParams, problem: Problem, num_workers: int) -> None:
    """What a schedule's size depends on."""
    params.num_requests = problem.b
    params.s_q = problem.s_q
    params.total_q = problem.total_q
    params.h_q = problem.h_q
    params.num_workers = num_workers
    params.cu_seqlens_q = int(problem.ragged)  # in place of an address: no pointer is followed


def check(workspace: Tensor, num_bytes: int, device: torch.device) -> None:
    """A caller's own workspace: uint8, contiguous, aligned, large enough, on the device."""
    check_tensor("workspace", workspace)
    if workspace.dtype != torch.uint8:
        raise TypeError(f"workspace: got {workspace.dtype}, expected torch.uint8")
    if workspace.device != device:
        raise wrong("workspace", f"device {workspace.device}", f"{device} as the query")
    if workspace.dim() != 1 or not workspace.is_contiguous():
        raise wrong(
            "workspace",
            f"{shape_of(workspace)}, strides {list(workspace.stride())}",
            "one contiguous dimension",
        )
    if workspace.numel() < num_bytes:
        raise wrong("workspace", f"{workspace.numel()} bytes", f"at least {num_bytes}")
    if workspace.data_ptr() % 16:
        raise wrong(
            "workspace",
            f"data at byte {workspace.data_ptr() % 16} of 16",
            "data aligned to 16 bytes",
        )
