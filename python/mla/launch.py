"""From tensors to addresses and strides, and on to the extension, which queues the kernels."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from . import _mla
from . import workspace as workspaces
from .checks import DTYPES
from .inputs import Inputs
from .problem import Problem
from .variants import Variant


def lengths(
    problem: Problem,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    *,
    max_len: int,
    num_workers: int,
) -> _mla.DecodeParams:
    """The parameters that a schedule depends on."""
    p = _mla.DecodeParams()
    workspaces.set_sizes(p, problem, num_workers, max_len)
    p.seq_lens = seq_lens.data_ptr()
    p.cu_seqlens_q = 0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr()
    return p


def add_tensors(
    p: _mla.DecodeParams, problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor | None
) -> None:
    """Where the kernels read and write."""
    past_d_v = problem.d_v * problem.dtype.itemsize  # bytes from a packed row to its rope part
    q, q_rope = inputs.q, inputs.q_rope
    p.q_nope = q.data_ptr()
    p.q_nope_batch, p.q_nope_token, p.q_nope_head = _row_strides(q, problem.ragged)
    p.q_rope = q.data_ptr() + past_d_v if q_rope is None else q_rope.data_ptr()
    p.q_rope_batch, p.q_rope_token, p.q_rope_head = _row_strides(
        q if q_rope is None else q_rope, problem.ragged
    )

    kv, kv_rope = inputs.kv, inputs.kv_rope
    p.latent = kv.data_ptr()
    p.latent_page, p.latent_token = kv.stride()[:2]
    p.rope = kv.data_ptr() + past_d_v if kv_rope is None else kv_rope.data_ptr()
    p.rope_page, p.rope_token = (kv if kv_rope is None else kv_rope).stride()[:2]

    p.block_table = inputs.block_table.data_ptr()
    p.block_table_stride = inputs.block_table.stride(0)
    p.num_pages, p.page_size = kv.shape[:2]

    p.out = out.data_ptr()
    p.out_batch, p.out_token, p.out_head = _row_strides(out, problem.ragged)
    if lse is not None:
        p.lse = lse.data_ptr()
        *outer, head = lse.stride()
        p.lse_batch, p.lse_token, p.lse_head = (
            (0, *outer, head) if problem.ragged else (*outer, head)
        )


def _row_strides(tensor: Tensor, ragged: bool) -> tuple[int, ...]:
    strides = tensor.stride()[:-1]
    return (0, *strides) if ragged else strides


def stream_of(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a CUDA device is being captured into a graph."""
    here = (
        nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    )
    with here:
        return torch.cuda.is_current_stream_capturing()


def write_schedule(
    variant: Variant, p: _mla.DecodeParams, schedule: Tensor, device: torch.device
) -> None:
    p.plan = schedule.data_ptr()
    _mla.launch_plan(variant.name, p, device.index, stream_of(device))


def decode(
    variant: Variant,
    problem: Problem,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    causal: bool,
    num_workers: int,
    schedule: Tensor | None,
    planned_len: int,
    workspace: Tensor | None,
) -> None:
    """Queues the schedule, unless it is given, the variant and the combine.

    planned_len: what lengths are clamped to in the schedule.
    """
    device = inputs.q.device
    p = lengths(
        problem, inputs.seq_lens, inputs.cu_seqlens_q, max_len=planned_len, num_workers=num_workers
    )
    planned_bytes = 0 if schedule is not None else workspaces.schedule_bytes(variant, p)
    o_bytes, lse_bytes = workspaces.partial_bytes(variant, p)
    p.max_len = min(planned_len, problem.max_len)
    add_tensors(p, problem, inputs, out, lse)
    p.scale_log2 = scale * math.log2(math.e)
    p.causal = int(causal)

    stream = stream_of(device)
    kept = workspaces.kept(device.index, stream)
    with kept.lock:
        if workspace is None:
            size = planned_bytes + o_bytes + lse_bytes
            if capturing(device):
                workspace = torch.empty(size, dtype=torch.uint8, device=device)
            else:
                workspace = kept.reserve(size, device)
        p.o_partial = workspace.data_ptr() + planned_bytes
        p.lse2_partial = p.o_partial + o_bytes
        if schedule is None:
            p.plan = workspace.data_ptr()
            _mla.launch_plan(variant.name, p, device.index, stream)
        else:
            p.plan = schedule.data_ptr()
        _mla.launch_decode(variant.name, DTYPES[problem.dtype], p, device.index, stream)
