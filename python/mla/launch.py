"""What the extension is told beside the tensors, which it reads itself."""

from __future__ import annotations

import torch

from . import _mla
from .problem import Problem


def sizes(problem: Problem, *, num_workers: int, max_len: int) -> _mla.DecodeParams:
    """What a schedule depends on but the lengths themselves."""
    p = _mla.DecodeParams()
    p.num_requests = problem.b
    p.s_q = problem.s_q
    p.total_q = problem.total_q
    p.h_q = problem.h_q
    p.num_workers = num_workers
    p.max_len = max_len
    p.batch_invariant = int(problem.batch_invariant)
    p.cu_seqlens_q = int(problem.ragged)  # in place of an address
    return p


def ordinal(device: torch.device) -> int:
    """The driver's number of a device."""
    return device.index or 0


def stream_of(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return torch._C._cuda_getCurrentRawStream(ordinal(device))


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a CUDA device is being captured into a graph."""
    return _mla.capturing(ordinal(device), stream_of(device))
