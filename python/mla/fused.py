"""Attention of every head with keys and values of its own: torch's kernels, and products without.

torch's scaled_dot_product_attention returns no log-sum-exp, so its backends are called below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

CUDNN = "cuDNN's attention"
FLASH = "torch's flash attention"
EFFICIENT = "torch's memory-efficient attention"
PRODUCTS = "torch, in float32"
MIN_CUDNN_SM = 90  # with keys and values of different widths
_LSE_ROWS = 32  # of a request in what the memory-efficient one returns, or a multiple
_LSE_ERROR = 2e-2  # of a kernel on the problem that it is tried on
_O_ERROR = 2e-2
_TRIED = 256  # query tokens


class State(NamedTuple):
    """Attention over a part of the KV."""

    o: Tensor  # [n, h, v]
    lse: Tensor  # float32 [n, h], natural


def cudnn(q: Tensor, rows: Tensor, scale: float, causal: bool) -> State:
    """q [n, h, d], rows [m, h, d + v]: key and value side by side; causal: query i sees keys up to
    i.

    cuDNN prepares for each combination of sizes and strides once in a thread, which takes the time
    of hundreds of calls.
    """
    n, h, d = q.shape
    k, v = rows.transpose(0, 1).unsqueeze(0).split_with_sizes((d, rows.shape[2] - d), -1)
    o, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(0, 1).unsqueeze(0), k, v, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return State(o.squeeze(0).transpose(0, 1), lse.view(h, n).T)


class Ragged(NamedTuple):
    """Queries and keys of several requests, one after the other."""

    cuts_q: Tensor  # int32 [b + 1]
    cuts_k: Tensor
    most_q: int
    most_k: int
    rows: Tensor | None  # int64 [n], of the queries in [b * most_q], rounded up; None if b is 1


def ragged(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Ragged:
    """Of requests with so many each."""
    cuts = [[0, *accumulate(queries)], [0, *accumulate(keys)]]
    cuts_q, cuts_k = torch.tensor(cuts, dtype=torch.int32, device=device)
    most_q, rows = max(queries), None
    if len(queries) > 1:
        room = -(-most_q // _LSE_ROWS) * _LSE_ROWS
        behind = torch.tensor([i * room - cut for i, cut in enumerate(cuts[0][:-1])], device=device)
        owners = torch.repeat_interleave(cuts_q.diff(), output_size=cuts[0][-1])
        rows = torch.arange(cuts[0][-1], device=device) + behind[owners]
    return Ragged(cuts_q, cuts_k, most_q, max(keys), rows)


def flash(q: Tensor, rows: Tensor, ragged: Ragged, scale: float, causal: bool) -> State:
    """As efficient.

    The kernel wants values as wide as keys, so it is given the end of the key with them: the first
    columns of what it returns mean nothing.
    """
    d, d_v = q.shape[-1], rows.shape[-1] - q.shape[-1]
    o, lse = torch.ops.aten._flash_attention_forward(
        q, rows[..., :d], rows[..., d_v:], ragged.cuts_q, ragged.cuts_k, ragged.most_q,
        ragged.most_k, 0.0, causal, False, scale=scale,
    )[:2]  # fmt: skip
    return State(o[..., d - d_v :], lse.T)


def efficient(q: Tensor, rows: Tensor, ragged: Ragged, scale: float, causal: bool) -> State:
    """As cudnn, for several requests; causal: the last query of a request sees all its keys, each
    one before it one fewer."""
    d = q.shape[-1]
    o, lse = torch.ops.aten._efficient_attention_forward(
        q[None], rows[None, ..., :d], rows[None, ..., d:], None, ragged.cuts_q, ragged.cuts_k,
        ragged.most_q, ragged.most_k, 0.0, 2 if causal else 0, True, scale=scale,
    )[:2]  # fmt: skip
    if ragged.rows is None:
        return State(o[0], lse[0, :, : len(q)].T)
    return State(o[0], lse.transpose(1, 2).flatten(0, 1).index_select(0, ragged.rows))


def products(q: Tensor, rows: Tensor, scale: float, causal: bool) -> State:
    """Two products and a softmax in float32; causal: as efficient, of one request."""
    k, v = rows.float().split_with_sizes((q.shape[-1], rows.shape[-1] - q.shape[-1]), -1)
    logits = (q.float().transpose(0, 1) * scale) @ k.permute(1, 2, 0)
    if causal:
        seen = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device)
        logits.masked_fill_(~seen.tril(len(k) - len(q)), -math.inf)
    lse = logits.logsumexp(-1)
    o = (logits - lse[..., None]).exp_() @ v.transpose(0, 1)
    return State(o.transpose(0, 1).to(q.dtype), lse.transpose(0, 1))


@lru_cache(maxsize=64)
def cudnn_works(device: torch.device, dtype: torch.dtype, d_qk: int, d_v: int) -> bool:
    """Whether cuDNN gives the right results for such heads: it is tried, once in a process.

    Not what torch.backends.cuda.enable_cudnn_sdp(False) turns off later.
    """
    if device.type != "cuda" or not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if torch.cuda.get_device_capability(device)[0] * 10 < MIN_CUDNN_SM:
        return False
    op = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)
    if op is None or "compute_log_sumexp" not in str(op.default._schema):  # before torch 2.5
        return False
    trial = _Trial.make(device, dtype, d_qk, d_v, keys=_TRIED)
    return trial.passed(lambda causal: cudnn(trial.q, trial.rows, trial.scale, causal))


@lru_cache(maxsize=64)
def flash_works(device: torch.device, dtype: torch.dtype, d_qk: int, d_v: int) -> bool:
    """As cudnn_works, of flash attention."""
    if device.type != "cuda" or d_v > d_qk:
        return False
    trial = _Trial.make(device, dtype, d_qk, d_v, keys=2 * _TRIED)
    one = ragged([_TRIED], [2 * _TRIED], device)
    return trial.passed(lambda causal: flash(trial.q, trial.rows, one, trial.scale, causal))


class _Trial(NamedTuple):
    """A small problem."""

    q: Tensor
    rows: Tensor  # keys and values
    scale: float

    @classmethod
    def make(
        cls, device: torch.device, dtype: torch.dtype, d_qk: int, d_v: int, *, keys: int
    ) -> _Trial:
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((_TRIED, 2, d_qk), (keys, 2, d_qk + d_v))
        q, rows = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
        return cls(q, rows, d_qk**-0.5)

    def passed(self, attention: Callable[[bool], State]) -> bool:
        """Causal or not."""
        for causal in (True, False):
            want = products(self.q, self.rows, self.scale, causal)
            try:
                got = attention(causal)
            except (RuntimeError, AttributeError, TypeError):
                return False
            if got.o.shape != want.o.shape or got.lse.shape != want.lse.shape:
                return False
            if not (got.lse - want.lse).abs().max() < _LSE_ERROR:
                return False
            if not (got.o - want.o).abs().max() < _O_ERROR:
                return False
        return True
