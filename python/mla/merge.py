"""`merge_states`: one attention state of two, each over its own part of the KV."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _mla, launch
from .checks import INT32_MAX, check_no_grad, check_tensor, shape_of, wrong
from .device import facts
from .errors import UnsupportedError
from .outputs import overlap, overlaps_itself

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
COLUMNS = 8  # what d is a multiple of
MIN_SM = 80


def merge_states(
    o_a: Tensor,
    lse_a: Tensor,
    o_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges the attention of the same queries over two disjoint parts of their KV.

    o_a, o_b: bf16, fp16 or float32 [..., h, d], d a multiple of 8, with unit stride in d and any
        other strides. Slow unless rows start at multiples of 16 bytes.
    lse_a, lse_b: float32 [..., h], natural logarithms, as `decode` and others return them. An
        infinite one of either sign says that the state is empty there: it saw no KV, and what its o
        holds does not matter.
    out: [..., h, d] in o_a's dtype, to write to. It may be o_a or o_b, and overlaps nothing else.
    lse: float32 [..., h], to write to. It may be lse_a or lse_b, and overlaps nothing else.

    Returns (out, lse). Computed in float32; 0 and -inf where both states are empty. The same on any
    device: CPU tensors by torch operations, CUDA tensors by one kernel on the current stream,
    without synchronisation and capturable.

    Raises TypeError and ValueError for arguments that do not fit (on a GPU also for strides whose
    leading dimensions do not fold into three), UnsupportedError for devices other than CPUs and
    GPUs of compute capability 8.0 or later, CudaError if the driver refuses.
    """
    inputs = {"o_a": o_a, "o_b": o_b, "lse_a": lse_a, "lse_b": lse_b}
    _check_inputs(inputs)
    given = {name: t for name, t in (("out", out), ("lse", lse)) if t is not None}
    for name, tensor in given.items():
        _check_output(name, tensor, inputs, given)
    if out is None:
        out = torch.empty(o_a.shape, dtype=o_a.dtype, device=o_a.device)
    if lse is None:
        lse = torch.empty(lse_a.shape, dtype=torch.float32, device=o_a.device)

    device = facts(o_a.device)
    if device.type not in ("cpu", "cuda") or 0 < device.sm < MIN_SM:
        raise UnsupportedError(
            f"merge_states: got tensors on {device}, expected a CPU or a GPU of compute capability "
            f"{MIN_SM / 10} or later",
            {},
        )
    merge_checked(o_a, lse_a, o_b, lse_b, out, lse)
    return out, lse


def merge_checked(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor
) -> None:
    """`merge_states` without its checks."""
    if facts(o_a.device).type == "cpu":
        _merge_on_cpu(o_a, lse_a, o_b, lse_b, out, lse)
    elif lse.numel():
        tensors = (o_a, o_b, out, lse_a, lse_b, lse)
        sizes, strides = _fold(lse.shape, [t.stride()[: lse.dim()] for t in tensors])
        addresses = [t.data_ptr() for t in tensors]
        _mla.launch_merge(
            DTYPES[o_a.dtype],
            addresses,
            strides,
            sizes,
            o_a.shape[-1],
            o_a.device.index,
            launch.stream_of(o_a.device),
        )


def _check_inputs(inputs: dict[str, Tensor]) -> None:
    for name, tensor in inputs.items():
        check_tensor(name, tensor)
    o_a, lse_a = inputs["o_a"], inputs["lse_a"]
    if o_a.dtype not in DTYPES:
        raise TypeError(
            f"o_a: got {o_a.dtype}, expected torch.bfloat16, torch.float16 or torch.float32"
        )
    if o_a.dim() < 2:
        raise wrong("o_a", shape_of(o_a), "[..., h, d]")
    d = o_a.shape[-1]
    if d < COLUMNS or d % COLUMNS:
        raise wrong("o_a", f"d = {d}", f"a positive multiple of {COLUMNS}")
    if lse_a.numel() > INT32_MAX or d > INT32_MAX:
        raise wrong("o_a", shape_of(o_a), "fewer than 2^31 rows and columns")
    for name, tensor in inputs.items():
        _check_like(name, tensor, o_a)


def _check_like(name: str, tensor: Tensor, o_a: Tensor) -> None:
    """An o has o_a's shape and dtype, an lse is float32 and lacks d."""
    is_lse = name.startswith("lse")
    dtype, shape = (torch.float32, o_a.shape[:-1]) if is_lse else (o_a.dtype, o_a.shape)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape:
        raise wrong(name, shape_of(tensor), f"{list(shape)}, as o_a has it")
    if tensor.device != o_a.device:
        raise wrong(name, f"device {tensor.device}", f"{o_a.device} as o_a")
    if not is_lse and tensor.stride(-1) != 1:
        raise wrong(name, f"stride {tensor.stride(-1)} in its last dimension", "1")
    check_no_grad(name, tensor)


def _check_output(
    name: str, tensor: Tensor, inputs: dict[str, Tensor], given: dict[str, Tensor]
) -> None:
    check_tensor(name, tensor)
    _check_like(name, tensor, inputs["o_a"])
    if overlaps_itself(tensor):
        raise wrong(
            name,
            f"strides {list(tensor.stride())} for {shape_of(tensor)}",
            "elements that do not overlap",
        )
    others = inputs | {other: t for other, t in given.items() if other != name}
    for other, before in others.items():
        if overlap(tensor, before) and not _same_view(tensor, before):
            same = "lse_a or lse_b" if name == "lse" else "o_a or o_b"
            raise ValueError(
                f"{name}: overlaps {other} in memory, expected memory of its own, or {same} itself"
            )


def _same_view(x: Tensor, y: Tensor) -> bool:
    """Whether each element of one is that of the other at the same place."""
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and x.data_ptr() == y.data_ptr()
        and all(n < 2 or s == t for n, s, t in zip(x.shape, x.stride(), y.stride(), strict=True))
    )


def _fold(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """Rows of any number of dimensions as three, of the same addresses in each tensor."""
    sizes: list[int] = []
    columns: list[list[int]] = []  # by dimension, each tensor's stride
    for size, steps in zip(shape, zip(*strides, strict=True), strict=True):
        if size == 1:
            continue
        if sizes and all(
            outer == step * size for outer, step in zip(columns[-1], steps, strict=True)
        ):
            sizes[-1] *= size
            columns[-1] = list(steps)
        else:
            sizes.append(size)
            columns.append(list(steps))
    if len(sizes) > 3:
        raise wrong(
            "o_a",
            f"rows {list(shape)} with strides that fold into {len(sizes)} dimensions",
            "all tensors to be dense in all but three of their leading dimensions",
        )
    missing = 3 - len(sizes)
    sizes = [1] * missing + sizes
    columns = [[0] * len(strides)] * missing + columns
    return sizes, [list(each) for each in zip(*columns, strict=True)]


def _merge_on_cpu(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor
) -> None:
    """As kernels/common/merge.cu."""
    lse_a, lse_b = (x.masked_fill(x.isinf(), -math.inf) for x in (lse_a, lse_b))
    largest = torch.maximum(lse_a, lse_b)
    base = largest.masked_fill(largest == -math.inf, 0)
    exp_a, exp_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = exp_a + exp_b
    scale = 1 / total.masked_fill(total == 0, math.inf)
    weighted = [
        ((exp * scale)[..., None] * o.float()).masked_fill((exp == 0)[..., None], 0)
        for exp, o in ((exp_a, o_a), (exp_b, o_b))
    ]
    out.copy_(weighted[0] + weighted[1])
    lse.copy_(largest + total.log())
