"""MLA attention in float64, written to be read: what every variant is held against.

Slow, and without bounds on memory. Lengths and page ids must be valid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import D_V
from .inputs import TensorOrPair


def decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mla.decode` in float64 and on any device: out [.., h_q, d_v] and natural lse [.., h_q]."""
    q, kv = _packed(q), _packed(kv_cache).flatten(2)
    d_v = D_V[q.shape[-1]]
    out = torch.zeros(*q.shape[:-1], d_v, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float64, device=q.device)
    cuts = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        tokens = i if cuts is None else slice(cuts[i], cuts[i + 1])
        pages = block_table[i, : -(-length // kv.shape[1])].long()
        rows = kv[pages].flatten(0, 1)[:length]
        out[tokens], lse[tokens] = attend(q[tokens], rows, d_v, scale=scale, causal=causal)
    return out, lse


def attend(
    q: Tensor, kv: Tensor, d_v: int, *, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """One request, absorbed: q [s_q, h_q, d_qk], kv [len, d_qk], whose first d_v are the values.

    Returns out [s_q, h_q, d_v] and lse [s_q, h_q]; 0 and -inf where a row sees nothing.
    """
    q, kv = q.double(), kv.double()
    return _softmax_pv(torch.einsum("thd,nd->thn", q, kv) * scale, kv[:, None, :d_v], causal)


def attend_expanded(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """One request as the model defines it: every head has keys and values of its own.

    q_nope [s_q, h_q, d], q_rope [s_q, h_q, d_rope], latent [len, d_latent], rope [len, d_rope],
    w_uk [h_q, d, d_latent], w_uv [h_q, d_head_v, d_latent]. Returns out [s_q, h_q, d_head_v] and
    lse [s_q, h_q].

    `attend` gives the same with q_nope @ w_uk as the query's first columns and w_uv applied to its
    output.
    """
    latent = latent.double()
    keys = torch.einsum("nc,hdc->nhd", latent, w_uk.double())
    values = torch.einsum("nc,hvc->nhv", latent, w_uv.double())
    logits = torch.einsum("thd,nhd->thn", q_nope.double(), keys)
    logits += torch.einsum("thr,nr->thn", q_rope.double(), rope.double())
    return _softmax_pv(logits * scale, values, causal)


def _softmax_pv(logits: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """logits [s_q, h_q, len], values [len, h_q or 1, d]."""
    s_q, h_q, length = logits.shape
    if causal:
        seen = torch.ones(s_q, length, dtype=torch.bool, device=logits.device).tril(length - s_q)
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("thn,nhd->thd", p, values.expand(-1, h_q, -1)), lse


def _packed(value: TensorOrPair) -> Tensor:
    return value if isinstance(value, Tensor) else torch.cat(tuple(value), -1)


class Errors(NamedTuple):
    """How far a result is from its reference."""

    cosine_distance: float  # 1 - cos(got, want): blind to scale
    relative_rmse: float  # |got - want| / |want|
    wmape: float  # sum of |got - want| / sum of |want|
    mse: float  # mean of (got - want)^2
    max_abs: float


def errors(got: Tensor, want: Tensor) -> Errors:
    """Over all elements, in float64. All 0 if both are equal, nan if either holds a nan."""
    got, want = got.double().flatten(), want.double().flatten()
    if torch.equal(got, want):
        return Errors(0.0, 0.0, 0.0, 0.0, 0.0)
    difference = got - want
    return Errors(
        float(1 - got @ want / (got.norm() * want.norm())),
        float(difference.norm() / want.norm()),
        float(difference.abs().sum() / want.abs().sum()),
        float(difference.square().mean()),
        float(difference.abs().max()),
    )
