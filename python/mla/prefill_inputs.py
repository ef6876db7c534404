"""The tensors of a `prefill`, and their checks; none reads a tensor's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .absorb import split_kv_b
from .checks import (
    DTYPES,
    check_index,
    check_lengths,
    check_no_grad,
    check_strides,
    check_tensor,
    shape_of,
    wrong,
)
from .inputs import TensorOrPair, check_pages, parts
from .known import once_per_layout
from .layer_config import Dims
from .merge import COLUMNS

# Un-absorbed, for checks in more precision than the kernels have.
WIDE_DTYPES = (torch.float32,)


def check_layer(dims: Dims, dtype: torch.dtype) -> None:
    """TypeError unless `prefill` takes them."""
    if not isinstance(dims, Dims):
        raise TypeError(f"dims: got {type(dims).__name__}, expected mla.models' or a LayerConfig's")
    if dtype not in (*DTYPES, *WIDE_DTYPES):
        raise TypeError(f"dtype: got {dtype}, expected torch.bfloat16 or torch.float16")


class _Kind(NamedTuple):
    """What is known of a call once it was checked."""

    dims: Dims
    shape: torch.Size  # leading dimensions of the caller's queries, heads included


@dataclass(slots=True)
class NewTokens:
    """Queries of new tokens, requests one after the other, and what they attend to."""

    q_nope: Tensor  # [tokens, h, nope]
    q_rope: Tensor | None  # [tokens, h, r]
    cache: Tensor  # latents first, [pages, page_size, c or c + r]
    rope_cache: Tensor | None
    block_table: Tensor
    seq_lens: Tensor
    cuts: Tensor | None  # the caller's cu_seqlens_q
    w_kv_b: Tensor  # [h * (nope + v), c]
    dims: Dims
    shape: torch.Size  # leading dimensions of the caller's queries, heads included

    @classmethod
    def of(
        cls,
        q: TensorOrPair,
        kv_cache: TensorOrPair,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor | None,
        w_kv_b: Tensor,
    ) -> NewTokens:
        """Checked. Packed queries are split; the tokens of uniform ones become one dimension."""
        q_nope, q_rope = parts("q", "q_nope, q_rope", q)
        cache, rope_cache = parts("kv_cache", "latent, rope", kv_cache)
        kind = _checked(
            q_nope, q_rope, cache, rope_cache, block_table, seq_lens, cu_seqlens_q, w_kv_b
        )
        r = kind.dims.rope
        if q_rope is None and r:
            q_nope, q_rope = q_nope[..., :-r], q_nope[..., -r:]
        if cu_seqlens_q is None:
            q_nope = q_nope.flatten(0, 1)
            q_rope = None if q_rope is None else q_rope.flatten(0, 1)
        return cls(
            q_nope, q_rope, cache, rope_cache, block_table, seq_lens, cu_seqlens_q, w_kv_b, *kind
        )

    def cu_seqlens_q(self) -> Tensor:
        """[b + 1]; made for uniform queries."""
        if self.cuts is not None:
            return self.cuts
        b, step = self.shape[:2]
        if not step:
            return self.seq_lens.new_zeros(b + 1)
        return torch.arange(0, b * step + 1, step, dtype=torch.int32, device=self.seq_lens.device)

    def cut_list(self) -> list[int]:
        """The same numbers. Reads the caller's tensor, if there is one."""
        if self.cuts is not None:
            found: list[int] = self.cuts.tolist()
            return found
        b, step = self.shape[:2]
        return [i * step for i in range(b + 1)]

    @property
    def kv_cache(self) -> TensorOrPair:
        return self.cache if self.rope_cache is None else (self.cache, self.rope_cache)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Views W_UK [h, nope, c] and W_UV [h, v, c]."""
        return split_kv_b(self.w_kv_b, self.dims)


@once_per_layout
def _checked(
    q_nope: Tensor,
    q_rope: Tensor | None,
    cache: Tensor,
    rope_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    w_kv_b: Tensor,
) -> _Kind:
    check_tensor("q" if q_rope is None else "q_nope", q_nope)
    if q_nope.dtype not in (*DTYPES, *WIDE_DTYPES):
        raise TypeError(f"q: got {q_nope.dtype}, expected torch.bfloat16 or torch.float16")
    check_tensor("kv_cache" if rope_cache is None else "latent", cache)
    check_tensor("w_kv_b", w_kv_b)
    rows = {"q_rope": q_rope, "latent": cache, "rope": rope_cache, "w_kv_b": w_kv_b}
    for name, tensor in rows.items():
        if tensor is not None:
            _check_like(name, tensor, q_nope)
    _check_queries(q_nope, q_rope, cu_seqlens_q)
    for name, part in {"latent": cache, "rope": rope_cache}.items():
        if part is not None:
            check_pages(name, part, cache)
    if w_kv_b.dim() != 2:
        raise wrong("w_kv_b", shape_of(w_kv_b), "[heads * (nope + v), kv_lora]")
    c, r = w_kv_b.shape[1], cache.shape[-1] - w_kv_b.shape[1]
    if rope_cache is not None:
        r = rope_cache.shape[-1] if r == 0 else -1
    if r < 0:
        raise wrong("w_kv_b", f"{c} columns", "as many as the cache has latent columns")
    heads, nope = q_nope.shape[-2:]
    if q_rope is None:
        nope -= r
        if nope <= 0:
            raise wrong("q", f"{nope + r} columns", f"nope + {r}, as the cache has")
    elif q_rope.shape[-1] != r:
        raise wrong("q_rope", f"{q_rope.shape[-1]} columns", f"{r}, as the cache has")
    v = w_kv_b.shape[0] // heads - nope
    if w_kv_b.shape[0] % heads or v <= 0:
        raise wrong("w_kv_b", shape_of(w_kv_b), f"[{heads} * ({nope} + v), kv_lora]")
    if v % COLUMNS:
        raise wrong("w_kv_b", f"v = {v}", f"a multiple of {COLUMNS}")
    b = None if cu_seqlens_q is not None else q_nope.shape[0]
    check_lengths(seq_lens, cu_seqlens_q, b, q_nope.device)
    b = seq_lens.shape[0]
    check_index("block_table", block_table, (b, None), q_nope.device, "[{}, max_pages]")
    return _Kind(Dims(heads=heads, kv_lora=c, nope=nope, rope=r, v=v), q_nope.shape[:-1])


def _check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {q.dtype} as in the query")
    if tensor.device != q.device:
        raise wrong(name, f"device {tensor.device}", f"{q.device} as the query")
    check_strides(name, tensor)
    check_no_grad(name, tensor)


def _check_queries(q: Tensor, q_rope: Tensor | None, cu_seqlens_q: Tensor | None) -> None:
    names = {"q": q} if q_rope is None else {"q_nope": q, "q_rope": q_rope}
    for name, tensor in names.items():
        if tensor.dim() != (4 if cu_seqlens_q is None else 3):
            ragged = "[tokens, h, d] with cu_seqlens_q"
            layout = "[b, s, h, d]" if cu_seqlens_q is None else ragged
            raise wrong(name, shape_of(tensor), layout)
        if tensor.shape[-2] < 1:
            raise wrong(name, shape_of(tensor), "at least one head")
        if tensor.shape[:-1] != q.shape[:-1]:
            before = list(q.shape[:-1])
            raise wrong(name, shape_of(tensor), f"{before} before its columns, as q_nope")
        check_strides(name, tensor)
        check_no_grad(name, tensor)
