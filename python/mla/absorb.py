"""Absorption: the key and value projections of a layer, moved to its query and its output.

A head's logit is q_nope . (W_UK latent) + q_rope . rope = (W_UK^T q_nope) . latent + q_rope . rope,
and its value sum is W_UV (sum of p latent): DeepSeek-V2, arXiv 2405.04434, section 2.1.2. So every
head attends to the cached rows themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_tensor, shape_of, wrong
from .layer_config import Dims


class AbsorbedWeights(NamedTuple):
    """Merged projections, [out, in] as in torch.nn.Linear."""

    w_q: Tensor  # [heads * d_qk, q_in]: gives `q` of `decode`, packed, before its RoPE
    w_o: Tensor  # [hidden, heads * kv_lora]: takes what `decode` returns


def absorb(
    w_q: Tensor,
    w_kv_b: Tensor,
    w_o: Tensor,
    dims: Dims,
    *,
    dtype: torch.dtype | None = None,
) -> AbsorbedWeights:
    """Merges W_UK into the query's projection and W_UV into the output's, once, offline.

    w_q: [heads * (nope + rope), q_in], `q_b_proj.weight` or `q_proj.weight` of a checkpoint.
    w_kv_b: [heads * (nope + v), kv_lora], `kv_b_proj.weight`: W_UK and W_UV of each head.
    w_o: [hidden, heads * v], `o_proj.weight`.
    dtype: of the result; w_q's by default.

    All three are floating point tensors of any dtype, on one device; 8-bit ones must be dequantised
    (checkpoint.attention_weights does). Products are computed in float32 (float64 if w_q is) and
    rounded once. Merged weights are larger, by d_qk / (nope + rope) and kv_lora / v: 3 and 4 times
    for DeepSeek-V3. Where reading weights is what a step waits for, absorb_query and expand_output
    with w_kv_b as it is take less time.

    Raises TypeError and ValueError for what is no matrix of the shapes above.
    """
    check_weights(dims, w_kv_b=w_kv_b, w_q=w_q, w_o=w_o)
    if dtype is not None and not is_wide(dtype):
        raise TypeError(f"dtype: got {dtype}, expected a floating point dtype of 16 bits or more")
    wide = torch.promote_types(w_q.dtype, torch.float32)
    w_uk, w_uv = (w.to(wide) for w in split_kv_b(w_kv_b, dims))
    by_head = w_q.to(wide).reshape(dims.heads, dims.head_dim, -1)
    q_nope, q_rope = by_head[:, : dims.nope], by_head[:, dims.nope :]
    q_latent = w_uk.transpose(1, 2) @ q_nope
    o_heads = w_o.to(wide).reshape(-1, dims.heads, dims.v).transpose(0, 1)
    result = dtype or w_q.dtype
    return AbsorbedWeights(
        torch.cat((q_latent, q_rope), 1).flatten(0, 1).to(result),
        (o_heads @ w_uv).transpose(0, 1).flatten(1).to(result),
    )


def split_kv_b(w_kv_b: Tensor, dims: Dims) -> tuple[Tensor, Tensor]:
    """Views W_UK [heads, nope, kv_lora] and W_UV [heads, v, kv_lora]."""
    by_head = w_kv_b.reshape(dims.heads, dims.nope + dims.v, dims.kv_lora)
    return by_head[:, : dims.nope], by_head[:, dims.nope :]


def absorb_query(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    """q_nope [.., heads, nope], w_uk [heads, nope, kv_lora] -> queries that meet latents,
    [.., heads, kv_lora], with the tokens of a head side by side in memory."""
    rows = q_nope.flatten(0, -3).transpose(0, 1)
    return torch.matmul(rows, w_uk).transpose(0, 1).view(*q_nope.shape[:-1], w_uk.shape[-1])


def expand_output(o_latent: Tensor, w_uv: Tensor, out: Tensor | None = None) -> Tensor:
    """o_latent [.., heads, kv_lora], w_uv [heads, v, kv_lora] -> values of heads [.., heads, v],
    contiguous, or written to `out`."""
    if out is None:
        out = o_latent.new_empty(*o_latent.shape[:-1], w_uv.shape[1])
    by_head, rows = w_uv.transpose(1, 2), o_latent.flatten(0, -3).transpose(0, 1)
    torch.bmm(rows, by_head, out=out.flatten(0, -3).transpose(0, 1))
    return out


def absorbed_bytes(heads: int, kv_lora: int, v: int, dtype: torch.dtype) -> int:
    """Of a query token's absorbed query, output over latents, values of heads and log-sum-exp."""
    return heads * ((2 * kv_lora + v) * dtype.itemsize + 4)


def is_wide(dtype: object) -> bool:
    """Floating point of 16 bits or more."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2


def check_weights(dims: Dims, **weights: Tensor) -> None:
    """Of w_kv_b, w_q and w_o, those given."""
    if not isinstance(dims, Dims):
        raise TypeError(f"dims: got {type(dims).__name__}, expected mla.models' or a LayerConfig's")
    rows = {
        "w_q": (dims.heads * dims.head_dim, None),
        "w_kv_b": (dims.heads * (dims.nope + dims.v), dims.kv_lora),
        "w_o": (None, dims.heads * dims.v),
    }
    device = next(iter(weights.values())).device if weights else None
    for name, weight in weights.items():
        check_tensor(name, weight)
        if not is_wide(weight.dtype):
            raise TypeError(f"{name}: got {weight.dtype}, expected a floating point dtype")
        want = rows[name]
        fits = weight.dim() == 2 and all(
            w in (None, n) for n, w in zip(weight.shape, want, strict=True)
        )
        if not fits:
            shape = ", ".join("any" if n is None else str(n) for n in want)
            raise wrong(name, shape_of(weight), f"[{shape}] for {dims.heads} heads")
        if weight.device != device:
            raise wrong(name, f"device {weight.device}", f"{device} as the others")
