"""The tensors of a call, and the checks of one against another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from .checks import (
    D_V,
    INT32_MAX,
    check_dims,
    check_index,
    check_lengths,
    check_no_grad,
    check_strides,
    check_tensor,
    dtype_name,
    shape_of,
    wrong,
)

TensorOrPair: TypeAlias = Tensor | tuple[Tensor, Tensor]


@dataclass(slots=True)
class Inputs:
    """What a decode call reads: packed rows of d_qk, or their first d_v columns and a rope part."""

    q: Tensor  # [b, s_q, h_q, d], ragged [tokens, h_q, d]
    q_rope: Tensor | None
    kv: Tensor  # [pages, page_size, d] or [pages, page_size, 1, d]
    kv_rope: Tensor | None
    block_table: Tensor  # int32 [b, max_pages]
    seq_lens: Tensor  # int32 [b]
    cu_seqlens_q: Tensor | None  # int32 [b + 1] when ragged

    @classmethod
    def of(
        cls,
        q: TensorOrPair,
        kv_cache: TensorOrPair,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor | None,
    ) -> Inputs:
        return cls(
            *parts("q", "q_nope, q_rope", q),
            *parts("kv_cache", "latent, rope", kv_cache),
            block_table,
            seq_lens,
            cu_seqlens_q,
        )

    @property
    def d_qk(self) -> int:
        return self.q.shape[-1] + (0 if self.q_rope is None else self.q_rope.shape[-1])

    def queries(self) -> dict[str, Tensor]:
        """By the names that messages use."""
        if self.q_rope is None:
            return {"q": self.q}
        return {"q_nope": self.q, "q_rope": self.q_rope}

    def caches(self) -> dict[str, Tensor]:
        if self.kv_rope is None:
            return {"kv_cache": self.kv}
        return {"latent": self.kv, "rope": self.kv_rope}

    def indices(self) -> dict[str, Tensor]:
        named = {"block_table": self.block_table, "seq_lens": self.seq_lens}
        if self.cu_seqlens_q is not None:
            named["cu_seqlens_q"] = self.cu_seqlens_q
        return named

    def check(self, d_v: int | None) -> None:
        """Everything but the tensors' values. Types first, then shapes, then memory."""
        queries, caches = self.queries(), self.caches()
        rows = queries | caches
        for name, tensor in rows.items():
            check_tensor(name, tensor)
        dtype, device = self.q.dtype, self.q.device
        dtype_name(dtype, of=next(iter(queries)))
        for name, tensor in rows.items():
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype} as in the query")
            if tensor.device != device:
                raise wrong(name, f"device {tensor.device}", f"{device} as the query")
        self._check_queries(queries)
        self._check_caches(caches)
        self._check_widths(d_v)
        b = None if self.cu_seqlens_q is not None else self.q.shape[0]
        check_lengths(self.seq_lens, self.cu_seqlens_q, b, device)
        table_shape = (self.seq_lens.shape[0], None)
        check_index("block_table", self.block_table, table_shape, device, "[{}, max_pages]")
        for name, tensor in rows.items():
            check_strides(name, tensor)
            check_no_grad(name, tensor)

    def _check_queries(self, queries: dict[str, Tensor]) -> None:
        ragged = self.cu_seqlens_q is not None
        for name, tensor in queries.items():
            if tensor.dim() != (3 if ragged else 4):
                layout = (
                    "[tokens, h_q, d_qk] with cu_seqlens_q" if ragged else "[b, s_q, h_q, d_qk]"
                )
                hint = "" if ragged or tensor.dim() != 3 else ", or cu_seqlens_q for a ragged query"
                raise wrong(name, shape_of(tensor), layout + hint)
            if tensor.shape[-2] < 1:
                raise wrong(name, shape_of(tensor), "at least one head")
            if tensor is not self.q and tensor.shape[:-1] != self.q.shape[:-1]:
                before = list(self.q.shape[:-1])
                raise wrong(name, shape_of(tensor), f"{before} before its columns, as q_nope")

    def _check_caches(self, caches: dict[str, Tensor]) -> None:
        for name, tensor in caches.items():
            check_pages(name, tensor, self.kv)

    def _check_widths(self, d_v: int | None) -> None:
        d_qk = self.d_qk
        check_dims("q", d_qk, d_v)
        cache_width = self.kv.shape[-1] + (0 if self.kv_rope is None else self.kv_rope.shape[-1])
        if cache_width != d_qk:
            raise wrong("kv_cache", f"rows of {cache_width}", f"{d_qk} as in the query")
        for name, rope, width in (
            ("q_nope", self.q_rope, self.q.shape[-1]),
            ("latent", self.kv_rope, self.kv.shape[-1]),
        ):
            if rope is not None and width != D_V[d_qk]:
                raise wrong(name, f"{width} columns", f"{D_V[d_qk]}, the d_v of d_qk = {d_qk}")


def check_pages(name: str, tensor: Tensor, like: Tensor) -> None:
    """The shape of a cache or of a part of one; `like` is the first part."""
    shape = tensor.shape
    if len(shape) not in (3, 4):
        raise wrong(name, shape_of(tensor), "[pages, page_size, d] or [pages, page_size, 1, d]")
    if len(shape) == 4 and shape[2] != 1:
        raise wrong(name, shape_of(tensor), "one KV head: [pages, page_size, 1, d]")
    if shape[1] < 1:
        raise wrong(name, shape_of(tensor), "a page_size of at least 1")
    if shape[0] > INT32_MAX or shape[1] > INT32_MAX:
        raise wrong(name, shape_of(tensor), "fewer than 2^31 pages and tokens per page")
    if tensor is not like and shape[:2] != like.shape[:2]:
        before = list(like.shape[:2])
        raise wrong(name, shape_of(tensor), f"{before} pages and page_size, as latent")


def parts(name: str, of: str, value: TensorOrPair) -> tuple[Tensor, Tensor | None]:
    """One tensor, or the two of a pair."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise TypeError(f"{name}: got {len(value)} tensors, expected one or the pair ({of})")
        return value[0], value[1]
    return value, None
