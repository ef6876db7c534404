"""Where results go: `out` and `lse`, checked or made.

No byte of an output may be an input's or another output's, or lie under two of its own elements.
What is accepted is decided from addresses alone:
- elements of one tensor are apart if, from the smallest stride up, each stride is larger than all
  that lies below it;
- two tensors are apart if their address ranges are, or if both repeat with a common period of bytes
  (one of their strides, or the greatest common divisor of all) and lie in different parts of it, as
  slices of one buffer do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import _mla
from .checks import check_no_grad, check_strides, check_tensor, shape_of, wrong
from .inputs import Inputs
from .problem import Problem


def check(
    problem: Problem,
    inputs: Inputs,
    out: Tensor | None,
    lse: Tensor | None,
    scratch: Tensor | None,
) -> None:
    """Of what is given: `out` [.., h_q, d_v] in q's dtype, float32 `lse` [.., h_q]."""
    leading = inputs.q.shape[:-1]
    if out is not None:
        _check("out", out, (*leading, problem.d_v), problem.dtype, inputs.q.device)
        check_strides("out", out)
    if lse is not None:
        _check("lse", lse, tuple(leading), torch.float32, inputs.q.device)
    written = {
        name: t for name, t in (("out", out), ("lse", lse), ("workspace", scratch)) if t is not None
    }
    if written:
        check_apart(written, inputs.queries() | inputs.caches() | inputs.indices())


def complete(
    problem: Problem, inputs: Inputs, out: Tensor | None, lse: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Makes what is not given; `lse` if it is wanted."""
    q = inputs.q
    if out is None:
        out = torch.empty((*q.shape[:-1], problem.d_v), dtype=problem.dtype, device=q.device)
    if lse is None and return_lse:
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    return out, lse


def fill_empty(out: Tensor, lse: Tensor | None) -> None:
    """What rows that see no token give."""
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
    if tuple(tensor.shape) != shape:
        raise wrong(name, shape_of(tensor), f"{list(shape)}")
    if tensor.device != device:
        raise wrong(name, f"device {tensor.device}", f"{device} as the query")
    check_no_grad(name, tensor)


def check_apart(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """ValueError unless all that is written lies apart from itself and from all others."""
    seen = [(name, tensor, *_mla.address_range(tensor)) for name, tensor in read.items()]
    for name, tensor in written.items():
        if not tensor.is_contiguous() and overlaps_itself(tensor):
            raise wrong(
                name,
                f"strides {list(tensor.stride())} for {shape_of(tensor)}",
                "elements that do not overlap",
            )
        first, end = _mla.address_range(tensor)
        for other, before, other_first, other_end in seen:
            if first < other_end and other_first < end and overlap(tensor, before):
                raise ValueError(f"{name}: overlaps {other} in memory, expected memory of its own")
        seen.append((name, tensor, first, end))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two of its elements may share a byte."""
    reach = 0
    for stride, size in sorted(
        (s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1
    ):
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the two may share a byte."""
    if a.numel() == 0 or b.numel() == 0 or a.is_meta or b.is_meta:
        return False
    a_start, b_start = a.data_ptr(), b.data_ptr()
    a_steps, b_steps = _steps(a), _steps(b)
    if a_start + sum(a_steps.values()) <= b_start or b_start + sum(b_steps.values()) <= a_start:
        return False
    strides = a_steps.keys() | b_steps.keys()
    for period in {*strides, math.gcd(*strides)} - {0}:
        a_bytes, b_bytes = _bytes_within(period, a_steps), _bytes_within(period, b_steps)
        ahead = (b_start - a_start) % period
        if a_bytes <= ahead and ahead + b_bytes <= period:
            return False
    return True


def _steps(tensor: Tensor) -> dict[int, int]:
    """By stride in bytes, how far its dimensions reach. 0 is the stride of an element."""
    size = tensor.element_size()
    steps = {0: size}
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = stride * size if stride > 1 else 0  # what is dense counts as one element
        steps[step] = steps.get(step, 0) + (n - 1) * stride * size
    return steps


def _bytes_within(period: int, steps: dict[int, int]) -> int:
    """How many bytes of each period it lies in, from its first one on; all if it drifts."""
    if any(stride % period for stride in steps if stride > period):
        return period
    return sum(reach for stride, reach in steps.items() if stride < period)
