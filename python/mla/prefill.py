"""`prefill`: attention of many new tokens over a paged cache, absorbed or un-absorbed."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import expanded, log
from .absorb import absorb_query, absorbed_bytes, expand_output
from .api import decode
from .checks import check_scale, check_size, wrong
from .inputs import TensorOrPair
from .prefill_choice import WORKSPACE_BYTES, Sizes, absorbed_at_once, check_method
from .prefill_inputs import NewTokens
from .prefill_plan import Absorbed, PrefillPlan, make_plan
from .prefill_times import Method

_DECODE = "mla.decode"
LEAST_TOKENS = 16  # of an absorbed step


class Prefill(NamedTuple):
    """What `prefill` returns."""

    out: Tensor  # [b, s, h, v] or [tokens, h, v], in q's dtype
    lse: Tensor  # float32 [b, s, h] or [tokens, h], natural logarithm, with any strides
    method: str  # the one that ran: "absorbed", "expanded", or "both" for different requests
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
    plan: PrefillPlan | None = None,
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
        None: for each request the one predicted to take less time (`mla.explain_prefill`).
    plan: of `mla.plan_prefill`, for this step: nothing is decided or read on the host.
    workspace_bytes: what intermediate results may take in all: queries and outputs of an absorbed
        step, or queries, keys, values and partial outputs of an expanded one. The scratch memory of
        `decode` is not in it (workspace.py bounds that), nor is out.
    variant: a pipeline or a variant of `decode` to force; "absorbed" only.

    Absorbed runs without synchronisation and can be captured, and so does anything with a plan,
    once it ran before. Expanded reads lengths on the host without one; its attention is cuDNN's,
    flash attention or torch's memory-efficient one on a GPU, matrix products in float32 on a CPU;
    it also takes float32. Rows that see no token give out = 0 and lse = -inf. An expanded result
    is rounded to q's dtype once per chunk.

    Raises TypeError and ValueError for arguments that do not fit, and what `decode` raises.
    """
    new = NewTokens.of(q, kv_cache, block_table, seq_lens, cu_seqlens_q, w_kv_b)
    scale = check_scale(scale)
    workspace_bytes = check_size("workspace_bytes", workspace_bytes, 1)
    check_method(method)
    if method == "expanded" and variant is not None:
        raise wrong("variant", repr(variant), "None with method 'expanded'")
    if variant is not None:
        method = "absorbed"
    sizes = Sizes.of(new, causal, workspace_bytes)
    if plan is not None:
        if method is not None:
            raise wrong("plan", "a plan", "None with a method or a variant")
        if not isinstance(plan, PrefillPlan):
            raise TypeError(f"plan: got {type(plan).__name__}, expected an mla.PrefillPlan")
        plan.check_fits(sizes)
    most = new.shape[1] if cu_seqlens_q is None else sizes.tokens
    if plan is None and (method or not absorbed_at_once(sizes, most)) and method != "absorbed":
        plan = make_plan(sizes, block_table, seq_lens, seq_lens.tolist(), new.cut_list(), method)
    step = Step(scale, causal, workspace_bytes, variant)
    if plan is None or plan.steps is None:
        out = new.q_nope.new_empty(sizes.tokens, new.dims.heads, new.dims.v)
        lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        _absorbed(new, out, lse, step)
        ran = Ran("absorbed", _DECODE)
    else:
        out, lse = expanded.attend(new, plan.steps, scale)
        ran = Ran("expanded", plan.steps.attention)
        if plan.absorbed is not None:
            _absorbed_among(new, plan.absorbed, out, lse, step)
            ran = Ran("both", f"{_DECODE} and {plan.steps.attention}")
    if log.dispatch_wanted():
        tokens = f"{sizes.tokens} new tokens of {sizes.b} requests"
        log.once(("prefill", ran), lambda: f"prefill, {tokens}: {ran.method} by {ran.attention}")
    return Prefill(out.view(*new.shape, new.dims.v), lse.view(new.shape), *ran)


class Step(NamedTuple):
    """Options of a call."""

    scale: float
    causal: bool
    workspace_bytes: int
    variant: str | None


class Ran(NamedTuple):
    method: str
    attention: str


def _absorbed_among(
    new: NewTokens, absorbed: Absorbed, out: Tensor, lse: Tensor, step: Step
) -> None:
    """Of some requests only."""
    rows = absorbed.rows
    some = replace(
        new,
        q_nope=new.q_nope[rows],
        q_rope=None if new.q_rope is None else new.q_rope[rows],
        block_table=absorbed.block_table,
        seq_lens=absorbed.seq_lens,
        cuts=absorbed.cu_seqlens_q,
    )
    if isinstance(rows, slice):
        _absorbed(some, out[rows], lse[rows], step)
        return
    some_out = out.new_empty(len(rows), *out.shape[1:])
    some_lse = lse.new_empty(len(rows), lse.shape[1])
    _absorbed(some, some_out, some_lse, step)
    out[rows], lse[rows] = some_out, some_lse


def _absorbed(new: NewTokens, out: Tensor, lse: Tensor, options: Step) -> None:
    """Steps of query tokens, of all requests in order. A request's last token of a step sees as
    much less than its last one as there are tokens behind the step."""
    d = new.dims
    per_token = absorbed_bytes(d.heads, d.kv_lora, d.v, new.q_nope.dtype)
    step, causal = options.workspace_bytes // per_token, options.causal
    if step < LEAST_TOKENS:
        least = LEAST_TOKENS * per_token
        raise wrong("workspace_bytes", options.workspace_bytes, f"at least {least}")
    if len(out) <= step:
        _absorbed_step(new, slice(None), new.cuts, new.seq_lens, out, lse, options)
        return
    all_cuts = new.cu_seqlens_q()
    for begin in range(0, len(out), step):
        end = min(begin + step, len(out))
        lens = new.seq_lens
        if causal and end < len(out):
            lens = lens - (all_cuts[1:] - end).clamp(min=0)
        rows, cuts = slice(begin, end), all_cuts.clamp(begin, end) - begin
        _absorbed_step(new, rows, cuts, lens, out[rows], lse[rows], options)


def _absorbed_step(
    new: NewTokens,
    rows: slice,
    cuts: Tensor | None,
    lens: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Step,
) -> None:
    """Of query tokens `rows`, which requests have by `cuts`; None: of all, as many each."""
    w_uk, w_uv = new.weights()
    q_latent, q_rope = absorb_query(new.q_nope[rows], w_uk), new.q_rope
    q_rope = None if q_rope is None else q_rope[rows]
    if cuts is None:
        lse, q_latent = lse.view(new.shape), q_latent.view(*new.shape, new.dims.kv_lora)
        q_rope = None if q_rope is None else q_rope.view(*new.shape, new.dims.rope)
    o_latent = decode(
        q_latent if q_rope is None else (q_latent, q_rope),
        new.kv_cache,
        new.block_table,
        lens,
        scale=options.scale,
        causal=options.causal,
        cu_seqlens_q=cuts,
        lse=lse,
        variant=options.variant,
    )
    expand_output(o_latent, w_uv, out)
