"""`prefill`: attention of many new tokens over a paged cache, absorbed or un-absorbed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import expanded, launch, log
from .absorb import absorb_query, expand_output
from .api import decode
from .checks import D_V, DTYPES, check_size, wrong
from .inputs import TensorOrPair
from .prefill_inputs import NewTokens

Method = Literal["absorbed", "expanded"]
WORKSPACE_BYTES = 512 << 20
LEAST_TOKENS = 16  # of an absorbed step


class Prefill(NamedTuple):
    """What `prefill` returns."""

    out: Tensor  # [b, s, h, v] or [tokens, h, v], in q's dtype
    lse: Tensor  # float32 [b, s, h] or [tokens, h], natural logarithm
    method: Method  # the one that ran
    attention: str  # what computed it


def prefill(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: Tensor,
    seq_lens: Tensor,
    w_kv_b: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    method: Method | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    variant: str | None = None,
) -> Prefill:
    """Attention of new tokens, whose rows the cache has already (`append`), before absorption.

    q: bf16 or fp16 [b, s, h, nope + rope], or ragged [tokens, h, nope + rope] with `cu_seqlens_q`;
        or the pair (q_nope, q_rope). Rotated. h heads, each with nope + rope columns.
    kv_cache, block_table, seq_lens, cu_seqlens_q, causal: as in `decode`; seq_lens with the new
        tokens.
    w_kv_b: of the same dtype, [h * (nope + v), kv_lora], `kv_b_proj.weight`: W_UK and W_UV.
    scale: of the logits: head_dim ** -0.5 and the model's YaRN factor (rope.softmax_scale).
    method: "absorbed": `decode` with W_UK in the query, the cache read as it is. "expanded": keys
        and values of every head are made of the cached latents, chunk by chunk, and chunks merged.
        None: the cheaper one by `cheaper_method`.
    workspace_bytes: what intermediate results may take in all: queries and outputs of an absorbed
        step, or queries, keys, values and partial outputs of an expanded one. The scratch memory of
        `decode` is not in it (workspace.py bounds that), nor is out.
    variant: a pipeline or a variant of `decode` to force; "absorbed" only.

    Absorbed runs without synchronisation and can be captured. Expanded reads lengths on the host
    once; its attention is torch's memory-efficient one on a GPU, matrix products in float32 on a
    CPU; it also takes float32. Rows that see no token give out = 0 and lse = -inf. An expanded
    result is rounded to q's dtype once per chunk.

    Raises TypeError and ValueError for arguments that do not fit, and what `decode` raises.
    """
    new = NewTokens.of(q, kv_cache, block_table, seq_lens, cu_seqlens_q, w_kv_b)
    workspace_bytes = check_size("workspace_bytes", workspace_bytes, 1)
    if method is None:
        mean = new.q_nope.shape[0] / max(len(seq_lens), 1)
        sizes = {"kv_lora": new.kv_lora, "nope": new.nope, "rope": new.rope, "v": new.v}
        chosen = choose(mean, new.q_nope.dtype, new.q_nope.device, **sizes)
        method = "absorbed" if variant is not None else chosen
    if method not in ("absorbed", "expanded"):
        raise wrong("method", repr(method), "'absorbed', 'expanded' or None")
    if method == "expanded" and variant is not None:
        raise wrong("variant", repr(variant), "None with method 'expanded'")
    out = new.q_nope.new_empty(new.q_nope.shape[0], new.heads, new.v)
    lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    if method == "absorbed":
        attention = "mla.decode"
        _absorbed(new, out, lse, scale, causal, workspace_bytes, variant)
    else:
        fused = expanded.is_fused(new)
        attention = "torch's memory-efficient attention" if fused else "torch, in float32"
        expanded.attend(new, out, lse, scale=scale, causal=causal, workspace_bytes=workspace_bytes)
    if log.dispatch_wanted():
        tokens = f"{new.q_nope.shape[0]} new tokens of {len(seq_lens)} requests"
        log.once(("prefill", method), lambda: f"prefill, {tokens}: {method} by {attention}")
    return Prefill(out.view(*new.shape, new.v), lse.view(new.shape), method, attention)


def cheaper_method(new_tokens: float, *, kv_lora: int, nope: int, rope: int, v: int) -> Method:
    """By operations for each head and KV token, of a request with `new_tokens` query tokens.

    Absorbed: 2 kv_lora + rope multiplications a query token. Expanded: nope + rope + v, and once
    kv_lora * (nope + v) to make the key and value; that counts twice, since writing and reading
    them takes about as long as the product. Expanded from 342 tokens on for DeepSeek-V3.
    """
    saved = (2 * kv_lora + rope) - (nope + rope + v)
    made = 2 * kv_lora * (nope + v)
    return "expanded" if saved > 0 and new_tokens * saved >= made else "absorbed"


def choose(
    new_tokens: float, dtype: torch.dtype, device: torch.device, *, kv_lora: int, nope: int,
    rope: int, v: int,
) -> Method:  # fmt: skip
    """cheaper_method, but absorbed while a graph is captured, and expanded where `decode` has no
    kernel for the dims or the dtype. new_tokens: the mean over requests."""
    if dtype not in DTYPES or D_V.get(kv_lora + rope) != kv_lora:
        return "expanded"
    if device.type == "cuda" and launch.capturing(device):
        return "absorbed"
    return cheaper_method(new_tokens, kv_lora=kv_lora, nope=nope, rope=rope, v=v)


def absorbed_bytes(heads: int, kv_lora: int, v: int, dtype: torch.dtype) -> int:
    """Of a query token's absorbed query, output over latents, values of heads and log-sum-exp."""
    return heads * ((2 * kv_lora + v) * dtype.itemsize + 4)


def _absorbed(
    new: NewTokens,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    workspace_bytes: int,
    variant: str | None,
) -> None:
    """Steps of query tokens, of all requests in order. A request's last token of a step sees as
    much less than its last one as there are tokens behind the step."""
    per_token = absorbed_bytes(new.heads, new.kv_lora, new.v, new.q_nope.dtype)
    step = workspace_bytes // per_token
    if step < LEAST_TOKENS:
        raise wrong("workspace_bytes", workspace_bytes, f"at least {LEAST_TOKENS * per_token}")
    cuts, lens = new.cu_seqlens_q, new.seq_lens
    for begin in range(0, len(out), step):
        end = min(begin + step, len(out))
        if causal and end < len(out):
            lens = new.seq_lens - (new.cu_seqlens_q[1:] - end).clamp(min=0)
        elif causal:
            lens = new.seq_lens
        if end - begin < len(out):
            cuts = new.cu_seqlens_q.clamp(begin, end) - begin
        rows = slice(begin, end)
        out[rows] = _absorbed_step(new, rows, cuts, lens, lse[rows], scale, causal, variant)


def _absorbed_step(
    new: NewTokens,
    rows: slice,
    cuts: Tensor,
    lens: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    variant: str | None,
) -> Tensor:
    """Of query tokens `rows`, which requests have by `cuts`: values of heads."""
    w_uk, w_uv = new.weights()
    q_latent = absorb_query(new.q_nope[rows], w_uk)
    o_latent = decode(
        q_latent if new.q_rope is None else (q_latent, new.q_rope[rows]),
        new.kv_cache,
        new.block_table,
        lens,
        scale=scale,
        causal=causal,
        cu_seqlens_q=cuts,
        lse=lse,
        variant=variant,
    )
    return expand_output(o_latent, w_uv)
