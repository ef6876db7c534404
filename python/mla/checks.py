"""What is accepted, and the checks of one tensor or number; none reads a tensor's values."""

from __future__ import annotations

import math
import operator
from numbers import Real

import torch
from torch import Tensor

from . import _mla

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
D_V = {row["d_qk"]: row["d_v"] for row in _mla.variants() if row["d_qk"]}  # none on the host row
ALIGNMENT = 16  # bytes: kernels load rows in pieces of this size
INT32_MAX = 2**31 - 1


def wrong(name: str, got: object, expected: object) -> ValueError:
    return ValueError(f"{name}: got {got}, expected {expected}")


def shape_of(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"


def dtype_name(dtype: torch.dtype, of: str = "dtype") -> str:
    if dtype not in DTYPES:
        raise TypeError(f"{of}: got {dtype}, expected torch.bfloat16 or torch.float16")
    return DTYPES[dtype]


def check_size(name: str, value: int, least: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an int") from None
    if not least <= value <= INT32_MAX:
        raise wrong(name, value, f"{least} to 2^31 - 1")
    return value


def check_scale(scale: object, name: str = "scale") -> float:
    """Of the logits; a finite number."""
    if isinstance(scale, Tensor):  # has __float__, which would wait for the device
        raise TypeError(f"{name}: got a torch.Tensor, expected a number")
    if not isinstance(scale, Real):
        raise TypeError(f"{name}: got {scale!r}, expected a number")
    if not math.isfinite(scale):
        raise wrong(name, scale, "a finite number")
    return float(scale)


def check_dims(name: str, d_qk: int, d_v: int | None) -> None:
    if d_qk not in D_V:
        known = ", ".join(f"{k} (d_v = {v})" for k, v in D_V.items())
        raise wrong(name, f"d_qk = {d_qk}", f"one of {known}")
    if d_v is not None and d_v != D_V[d_qk]:
        raise wrong("d_v", d_v, f"{D_V[d_qk]} with d_qk = {d_qk}")


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {tensor.layout}, expected a dense one")


def check_lengths(
    seq_lens: Tensor, cu_seqlens_q: Tensor | None, b: int | None, device: torch.device
) -> None:
    """The lengths of `b` requests, of any number if None."""
    check_index("seq_lens", seq_lens, (b,), device, "[b]" if b is None else "[{}]")
    if cu_seqlens_q is not None:
        cuts = seq_lens.shape[0] + 1
        layout = "[{}], b + 1 where seq_lens has b"
        check_index("cu_seqlens_q", cu_seqlens_q, (cuts,), device, layout)


def check_index(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device, layout: str
) -> None:
    """int32 of a shape, where None is any size, dense in the last dimension."""
    check_tensor(name, tensor)
    if tensor.dtype != torch.int32:
        raise TypeError(
            f"{name}: got {tensor.dtype}, expected torch.int32: "
            f"convert it once with {name}.to(torch.int32)"
        )
    sizes = tensor.shape
    if len(sizes) != len(shape) or (shape[0] is not None and sizes[0] != shape[0]):
        raise wrong(name, shape_of(tensor), layout.format(shape[0]))
    if tensor.device != device:
        raise wrong(name, f"device {tensor.device}", f"{device} as the others")
    if sizes[-1] > 1 and tensor.stride(-1) != 1:
        raise wrong(name, f"stride {tensor.stride(-1)} in its last dimension", "1")


def check_strides(name: str, tensor: Tensor) -> None:
    """Rows of unit stride that start at multiples of 16 bytes. Size 1 makes any stride right."""
    size = tensor.element_size()
    aligned = tensor.data_ptr() % ALIGNMENT == 0
    if aligned and tensor.is_contiguous() and tensor.shape[-1] * size % ALIGNMENT == 0:
        return  # as nearly all are
    if tensor.numel() == 0:
        return
    *outer, last = zip(tensor.shape, tensor.stride(), strict=True)
    if last[0] > 1 and last[1] != 1:
        raise wrong(name, f"stride {last[1]} in its last dimension", "1")
    if any(n > 1 and stride * size % ALIGNMENT for n, stride in outer):
        raise wrong(
            name,
            f"strides {list(tensor.stride())}",
            f"multiples of {ALIGNMENT // size} (16 bytes) before the last",
        )
    if not aligned:
        raise wrong(
            name, f"data at byte {tensor.data_ptr() % ALIGNMENT} of 16", "data aligned to 16 bytes"
        )


def check_no_grad(name: str, tensor: Tensor) -> None:
    """A result without history would be a silent wrong gradient, so autograd users hear of it."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires grad, but mla has no backward: call it under "
            "torch.inference_mode() or torch.no_grad(), or detach the tensor"
        )
