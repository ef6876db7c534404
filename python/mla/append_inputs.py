"""The tensors of an `append`, and their checks; none reads a tensor's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import (
    DTYPES,
    INT32_MAX,
    check_index,
    check_no_grad,
    check_strides,
    check_tensor,
    shape_of,
    wrong,
)
from .device import facts
from .errors import UnsupportedError
from .inputs import check_pages
from .known import once_per_layout
from .outputs import check_apart

MIN_SM = 80
COLUMNS = 8  # what widths are multiples of
# The last two on a CPU only, for checks in more precision than decode has.
_DTYPES = (*DTYPES, torch.float32, torch.float64)


@dataclass(slots=True)
class NewRows:
    """Rows for a cache: packed, or its latent and rope columns as a pair."""

    latent: Tensor  # [b, s, c], ragged [tokens, c]
    rope: Tensor | None
    cache: Tensor
    rope_cache: Tensor | None
    block_table: Tensor
    positions: Tensor
    cu_seqlens_q: Tensor | None
    cos_sin: Tensor | None
    interleaved: bool

    @property
    def b(self) -> int:
        return self.block_table.shape[0]

    def cache_parts(self) -> tuple[Tensor, Tensor | None]:
        """Where latents go, and where rope columns go if there are any."""
        if self.rope is None or self.rope_cache is not None:
            return self.cache, self.rope_cache
        c = self.latent.shape[-1]
        return self.cache[..., :c], self.cache[..., c:]

    def check(self) -> None:
        """Everything but the tensors' values."""
        _check_layouts(*(getattr(self, name) for name in self.__slots__))
        device = facts(self.latent.device)
        if device.type not in ("cpu", "cuda") or 0 < device.sm < MIN_SM:
            raise UnsupportedError(
                f"append: got tensors on {device}, expected a CPU or a GPU of compute capability "
                f"{MIN_SM / 10} or later",
                {},
            )
        read = {
            "latent": self.latent,
            "rope": self.rope,
            "block_table": self.block_table,
            "positions": self.positions,
            "cu_seqlens_q": self.cu_seqlens_q,
            "cos_sin": self.cos_sin,
        }
        check_apart(self._caches(), {name: t for name, t in read.items() if t is not None})

    def check_layouts(self) -> None:
        """Of each tensor, and of one against another, but for where they are."""
        self._check_new()
        self._check_caches()
        device = self.latent.device
        b = self.latent.shape[0]
        if self.cu_seqlens_q is not None:
            check_index("cu_seqlens_q", self.cu_seqlens_q, (None,), device, "[b + 1]")
            b = self.cu_seqlens_q.shape[0] - 1
            if b < 0:
                raise wrong("cu_seqlens_q", shape_of(self.cu_seqlens_q), "[b + 1]")
        check_index("block_table", self.block_table, (b, None), device, "[{}, max_pages]")
        if self.cos_sin is not None:
            self._check_angles(self.cos_sin)

    def _check_new(self) -> None:
        latent, ragged = self.latent, self.cu_seqlens_q is not None
        rows = {"latent": latent} if self.rope is None else {"latent": latent, "rope": self.rope}
        for name, tensor in rows.items():
            self._check_kind(name, tensor)
            if tensor.dim() != (2 if ragged else 3):
                layout = "[tokens, columns] with cu_seqlens_q" if ragged else "[b, s, columns]"
                hint = ", or cu_seqlens_q for ragged tokens" if tensor.dim() == 2 else ""
                raise wrong(name, shape_of(tensor), layout + hint)
            if tensor.shape[-1] < COLUMNS or tensor.shape[-1] % COLUMNS:
                raise wrong(
                    name, f"{tensor.shape[-1]} columns", f"a positive multiple of {COLUMNS}"
                )
            if tensor.shape[:-1] != latent.shape[:-1]:
                before = list(latent.shape[:-1])
                raise wrong(name, shape_of(tensor), f"{before} before its columns, as latent")
            check_strides(name, tensor)
        positions = self.positions
        check_tensor("positions", positions)
        if positions.shape != latent.shape[:-1]:
            raise wrong("positions", shape_of(positions), f"{list(latent.shape[:-1])}, as latent")
        if positions.numel() > INT32_MAX:
            raise wrong("positions", shape_of(positions), "fewer than 2^31 tokens")
        check_index("positions", positions, tuple(positions.shape), latent.device, "{}")

    def _check_kind(self, name: str, tensor: Tensor) -> None:
        """Dtype and device, as latent has them."""
        check_tensor(name, tensor)
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}, expected torch.bfloat16 or torch.float16")
        if tensor.dtype != self.latent.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {self.latent.dtype} as latent")
        if tensor.device != self.latent.device:
            raise wrong(name, f"device {tensor.device}", f"{self.latent.device} as latent")
        check_no_grad(name, tensor)

    def _caches(self) -> dict[str, Tensor]:
        """By the names that messages use."""
        if self.rope_cache is None:
            return {"kv_cache": self.cache}
        return {"latent cache": self.cache, "rope cache": self.rope_cache}

    def _check_caches(self) -> None:
        c, r = self.latent.shape[-1], 0 if self.rope is None else self.rope.shape[-1]
        if self.rope is None and self.rope_cache is not None:
            raise TypeError("kv_cache: got a pair, expected one tensor without rope")
        widths = [c + r] if self.rope_cache is None else [c, r]
        for (name, tensor), width in zip(self._caches().items(), widths, strict=True):
            self._check_kind(name, tensor)
            check_pages(name, tensor, self.cache)
            if tensor.shape[-1] != width:
                raise wrong(name, f"rows of {tensor.shape[-1]}", f"{width}, as latent and rope")
            check_strides(name, tensor)

    def _check_angles(self, cos_sin: Tensor) -> None:
        check_tensor("cos_sin", cos_sin)
        if self.rope is None:
            raise ValueError("cos_sin: got a tensor, expected None without rope")
        if cos_sin.dtype != torch.float32:
            raise TypeError(f"cos_sin: got {cos_sin.dtype}, expected torch.float32")
        r = self.rope.shape[-1]
        if cos_sin.dim() != 2 or cos_sin.shape[1] != r:
            raise wrong("cos_sin", shape_of(cos_sin), f"[positions, {r}]")
        if cos_sin.device != self.rope.device:
            raise wrong("cos_sin", f"device {cos_sin.device}", f"{self.rope.device} as rope")
        if not self.interleaved and r % (2 * COLUMNS):
            least = 2 * COLUMNS
            raise wrong("rope", f"{r} columns", f"a multiple of {least} where pairs are halves")
        check_strides("cos_sin", cos_sin)


@once_per_layout
def _check_layouts(*of_rows: Any) -> None:
    NewRows(*of_rows).check_layouts()
