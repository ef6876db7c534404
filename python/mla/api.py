"""`decode`: calls like one before are done by the extension, others by `first_call`."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, getdoc, signature
from typing import Any, Literal, TypeVar, cast, overload

from torch import Tensor

from . import _mla, first_call
from .dispatch import in_context
from .inputs import TensorOrPair
from .plan import Plan

F = TypeVar("F", bound=Callable[..., Any])


def _in_c(function: F) -> F:
    """The function that is called like this one, which it calls for what is not prepared."""
    parameters = signature(function).parameters.values()
    plain = Signature([each.replace(annotation=each.empty) for each in parameters])
    doc = f"{function.__name__}{plain}\n--\n\n{getdoc(function)}"
    return cast(F, _mla.make_entry(function, in_context, doc))


@overload
def decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    d_v: int | None = None,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    workspace: Tensor | None = None,
    batch_invariant: bool = False,
    max_seq_len: int | None = None,
    variant: str | None = None,
) -> Tensor: ...


@overload
def decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    d_v: int | None = None,
    return_lse: Literal[True],
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    workspace: Tensor | None = None,
    batch_invariant: bool = False,
    max_seq_len: int | None = None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    d_v: int | None = None,
    return_lse: bool,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    workspace: Tensor | None = None,
    batch_invariant: bool = False,
    max_seq_len: int | None = None,
    variant: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


@_in_c
def decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    d_v: int | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    workspace: Tensor | None = None,
    batch_invariant: bool = False,
    max_seq_len: int | None = None,
    variant: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Absorbed MLA attention of a few query tokens per request over a paged latent cache.

    q: bf16 or fp16 [b, s_q, h_q, d_qk], or ragged [tokens, h_q, d_qk] with `cu_seqlens_q`; or the
        pair (q_nope, q_rope) of its first d_v columns and the rest.
    kv_cache: of the same dtype, [pages, page_size, d_qk] or [pages, page_size, 1, d_qk]; or the
        pair (latent, rope). Rows of q and cache have unit stride and start at multiples of 16
        bytes; all other strides are free.
    block_table: int32 [b, max_pages], the pages of each request in order. Entries past a request's
        last page are ignored.
    seq_lens: int32 [b], KV tokens of each request, the query's own included. May be zero.
    scale: of the logits. Models fold their YaRN factor into it, so there is no default.
    causal: the last query token of a request sees all its KV tokens, each one before it one fewer.
    cu_seqlens_q: int32 [b + 1], where each request's query tokens begin and end, from 0 to tokens.
    d_v: columns of the values. It follows from d_qk, as `mla.variants()` lists them; another is a
        ValueError.
    out: [b, s_q, h_q, d_v] or [tokens, h_q, d_v] in q's dtype, to write to. Overlapping no input.
    lse: float32 [b, s_q, h_q] or [tokens, h_q], to write to, with any strides. Written whenever it
        is given.
    plan: of `mla.plan`, for calls that share lengths and sizes.
    workspace: uint8 scratch memory of the caller's; the error for a small one says how many bytes
        are needed.
    batch_invariant: a request's results have the same bits whatever the other requests are, where
        in the batch it stands, and however its pages lie: variant and splits follow from its own
        length and rows, its dims and dtype. Slower, and needs scratch memory that grows with the
        batch (mla/workspace.py has the formula). A plan for it is made with the same argument.
    max_seq_len: KV tokens of the longest request, where the host knows them. The choice of a
        variant goes by it, rounded up, instead of what a row of the block table reaches, which is
        more in engines whose block tables are for the longest context. It limits nothing: longer
        requests get right results too. With a plan or `batch_invariant` it decides nothing.
    variant: a pipeline or a variant to force; `mla.variants()` lists them.

    Returns out, or (out, lse) with `return_lse`: lse is the natural logarithm of the sum of
    exp(scaled logits). Rows that see no token give out = 0 and lse = -inf. Query tokens that
    `cu_seqlens_q` gives to no request are left undefined, and so are all results if its requests
    overlap.

    Everything runs on the current stream of q's device, without synchronisation, and can be
    captured in a CUDA graph and replayed with other values in all tensors. Lengths, page ids and
    `cu_seqlens_q` are clamped to what the tensors hold; under MLA_VALIDATE=1 they are checked
    instead, which synchronises.

    Raises TypeError and ValueError for arguments that do not fit, UnsupportedError if no variant or
    not the forced one can run the call, CudaError if the driver refuses.
    """
    return first_call.decode(
        q,
        kv_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        out,
        lse,
        workspace,
        plan,
        scale,
        causal,
        d_v,
        return_lse,
        batch_invariant,
        max_seq_len,
        variant,
    )
