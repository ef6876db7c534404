"""Which way of prefill a request gets: the one predicted to take less time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import fused, launch, prefill_costs
from .checks import D_V, DTYPES, wrong
from .device import facts
from .layer_config import Dims
from .prefill_estimate import Request, estimate
from .prefill_inputs import NewTokens
from .prefill_times import METHODS, Method, PrefillEstimate

WORKSPACE_BYTES = 512 << 20
_DIGITS = 5  # of sizes in binary, rounded up: predictions are kept


class Sizes(NamedTuple):
    """What a plan is for, beside lengths."""

    dims: Dims
    dtype: torch.dtype
    device: torch.device
    b: int
    tokens: int  # query tokens of all requests
    max_pages: int
    num_pages: int
    page_size: int
    causal: bool
    workspace_bytes: int

    @classmethod
    def of(cls, new: NewTokens, causal: bool, workspace_bytes: int) -> Sizes:
        q, table = new.q_nope, new.block_table
        num_pages, page_size = new.cache.shape[:2]
        return cls(
            new.dims, q.dtype, q.device, table.shape[0], q.shape[0], table.shape[1], num_pages,
            page_size, causal, workspace_bytes,
        )  # fmt: skip

    @property
    def reach(self) -> int:
        """KV tokens of the longest request that there can be."""
        return self.max_pages * self.page_size if self.num_pages else 0

    @property
    def decodes(self) -> bool:
        """Whether `decode` has kernels for them."""
        return self.dtype in DTYPES and D_V.get(self.dims.d_qk) == self.dims.kv_lora

    def request(self, b: int, new: int, length: int) -> Request:
        """b alike; new and length nearly so."""
        new = _nearly(new)
        return Request(
            self.dims, self.dtype, b, new, new + _nearly(max(length - new, 0)), self.page_size,
            self.causal, self.workspace_bytes,
        )  # fmt: skip


def _nearly(n: int) -> int:
    step = 1 << max(n.bit_length() - _DIGITS, 0)
    return -(-n // step) * step


def check_method(method: str | None) -> None:
    if method not in (*METHODS, None):
        raise wrong("method", repr(method), "'absorbed', 'expanded' or None")


def cheaper_of(sizes: Sizes, new: int, length: int, captured: bool) -> Method:
    """Of a request, as if all of the call were like it, in a CUDA graph or without."""
    if not sizes.decodes:
        return "expanded"
    if sizes.device.type != "cuda":
        return by_multiplications(sizes.dims, new)
    return _estimate(sizes, sizes.b, new, length).method(captured)


def _estimate(sizes: Sizes, b: int, new: int, length: int) -> PrefillEstimate:
    cudnn = fused.cudnn_works(sizes.device, sizes.dtype, sizes.dims.head_dim, sizes.dims.v)
    return estimate(sizes.request(b, new, length), facts(sizes.device), cudnn)


def by_multiplications(dims: Dims, new: int) -> Method:
    """Where no time can be predicted. For each head and KV token an absorbed token takes `saved`
    more than an un-absorbed one, and making key and value takes `made`, which counts twice: it is
    written and read again."""
    saved = (2 * dims.kv_lora + dims.rope) - (dims.head_dim + dims.v)
    made = dims.kv_lora * (dims.nope + dims.v)
    return "expanded" if saved > 0 and new * saved >= 2 * made else "absorbed"


def absorbed_at_once(sizes: Sizes, most: int) -> bool:
    """Whether no request, with up to `most` new tokens, is worth reading lengths for; or nobody may
    read them. Times go about linearly with the length: what holds for the shortest and the longest
    holds between them."""
    if not sizes.decodes:
        return False
    if sizes.device.type != "cuda":
        return by_multiplications(sizes.dims, most) == "absorbed"
    if launch.capturing(sizes.device):
        return True
    b = max(sizes.tokens // max(most, 1), 1)
    planning_us = prefill_costs.of(facts(sizes.device)).costs.planning_us
    for length in {most, max(sizes.reach, most)}:
        found = _estimate(sizes, b, most, length)
        if found.gain_us(captured=False) * b > planning_us:
            return False
    return True
