"""Scratch memory of the launches: a schedule and the partial results of split requests.

    schedule  48 + 128 * num_workers + 32 * row_blocks + 12 * (b + 1) bytes, rounded up to 256;
              none with a plan
    partials  slots * block_rows * (2 * d_v + 36) bytes, slots = 2 * num_workers + 1: 16 bits a
              number, and a row's log-sum-exp, once for itself and for each of eight runs of columns

num_workers is the number of SMs; row_blocks is b * ceil(s_q * h_q / block_rows), of a ragged query
ceil(total_q * h_q / block_rows) + b. With `batch_invariant`

    schedule  48 + 64 * num_workers + 32 * max(slots, row_blocks) + 32 * row_blocks
              + 16 * b bytes, rounded up to 256; none with a plan
    slots     b * parts + row_blocks, parts the least of max_len / 1024, sqrt(max_len) / 8, each
              rounded up, and 64, or, if that is more and requests may have several row blocks (the
              query is ragged, too), the least of max_len / 512, rounded up, and 8; none if no
              request can be longer than 1024 tokens, or in n row blocks each than 512 * (n + 1),
              1024 * n from 8 of them on

where max_len is what a row of the block table reaches, or what the plan was made for. One buffer is
kept for each device and stream, as calls on a stream follow each other; a captured graph gets
buffers of its own from torch's pool of that graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _mla, launch
from .checks import check_tensor, shape_of, wrong
from .problem import Problem
from .variants import Variant


def sizes() -> list[dict[str, Any]]:
    """What is kept, in bytes, by device index and stream handle."""
    return [
        {"device": device, "stream": stream, "bytes": size}
        for device, stream, size in _mla.workspaces()
    ]


def schedule_bytes(variant: Variant, params: _mla.DecodeParams) -> int:
    """Of the schedule that `params` asks for; only their sizes count."""
    size = _mla.plan_bytes(variant.name, params)
    return -(-size // _mla.SCHEDULE_ALIGNMENT) * _mla.SCHEDULE_ALIGNMENT


def bytes_needed(
    variant: Variant, problem: Problem, num_workers: int, planned_len: int | None
) -> int:
    """By a decode call. `planned_len`: the `max_len` of its plan, if it has one."""
    if variant.on_host:
        return 0
    max_len = problem.max_len if planned_len is None else planned_len
    params = launch.sizes(problem, num_workers=num_workers, max_len=max_len)
    schedule = schedule_bytes(variant, params) if planned_len is None else 0
    return schedule + sum(_mla.partial_bytes(variant.name, params))


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
