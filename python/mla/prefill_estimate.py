"""How long both ways of prefill should take for a request: a model of what each of them does."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from . import _mla, dispatch, expanded_steps, prefill_costs
from .absorb import absorbed_bytes
from .chunks import Part, chunks, seen_requests
from .device import Device
from .errors import UnsupportedError
from .estimate import ceil_div, model
from .layer_config import Dims
from .prefill_costs import PrefillCosts
from .prefill_times import PrefillEstimate, Times
from .problem import Problem

CUDNN_ROWS, FLASH_ROWS = 128, 128  # query tokens of a head that an SM attends with at one time
CUDNN_GPUS = (90, 100, 103)  # where fused.cudnn_works is expected to say yes


class Request(NamedTuple):
    """One of `b` requests that are alike."""

    dims: Dims
    dtype: torch.dtype
    b: int
    new: int  # query tokens
    length: int  # KV tokens, the new ones included
    page_size: int
    causal: bool
    workspace_bytes: int


class Products(NamedTuple):
    """Matrix products: their arithmetic, and the bytes that they read and write."""

    flop: float
    moved: float

    def us(self, costs: PrefillCosts) -> float:
        compute_us = self.flop / (costs.product_tflops * 1e6)
        return _mla.overlapped(compute_us, self.moved / (costs.memory_gbs * 1e3))


class AbsorbedWork(NamedTuple):
    """Of all requests."""

    steps: int
    decode_us: float  # as predicted for `decode`
    products: Products

    def us(self, costs: PrefillCosts) -> float:
        launches_us = self.steps * costs.absorbed_us
        return launches_us + costs.decode_factor * self.decode_us + self.products.us(costs)

    def host_us(self, costs: PrefillCosts) -> float:
        return self.steps * costs.absorbed_host_us


class ExpandedWork(NamedTuple):
    """Of all requests."""

    chunks: float
    attentions: float
    products: Products
    moved: float  # bytes of what is copied
    cudnn_flop: float  # of all SMs, as long as one is at work
    flash_flop: float

    def us(self, costs: PrefillCosts) -> float:
        launches_us = self.chunks * costs.chunk_us + self.attentions * costs.attention_us
        attention_us = (
            self.cudnn_flop / costs.cudnn_tflops + self.flash_flop / costs.flash_tflops
        ) / 1e6
        copies_us = self.moved / (costs.memory_gbs * 1e3)
        products_us = self.products.us(costs)
        return costs.expanded_us + launches_us + attention_us + copies_us + products_us

    def host_us(self, costs: PrefillCosts) -> float:
        launches_us = self.chunks * costs.chunk_host_us + self.attentions * costs.attention_host_us
        return costs.expanded_host_us + launches_us


@lru_cache(maxsize=4096)
def estimate(request: Request, device: Device, cudnn: bool) -> PrefillEstimate:
    """On a GPU. cudnn: whether it computes un-absorbed attention there."""
    costs = prefill_costs.of(device).costs

    def times(work: AbsorbedWork | ExpandedWork) -> Times:
        return Times(work.us(costs) / request.b, work.host_us(costs) / request.b)

    absorbed = absorbed_work(request, device)
    expanded = expanded_work(request, device.sm_count, cudnn)
    return PrefillEstimate(None if absorbed is None else times(absorbed), times(expanded))


def absorbed_work(r: Request, device: Device) -> AbsorbedWork | None:
    """None where `decode` has no kernel."""
    d, tokens = r.dims, r.b * r.new
    per_token = absorbed_bytes(d.heads, d.kv_lora, d.v, r.dtype)
    steps = ceil_div(tokens, max(r.workspace_bytes // per_token, 1))
    decode_us = 0.0
    for step in range(steps):
        # The tokens of a step are its requests', or, where one request goes through several steps,
        # the next of that one.
        b, new = ceil_div(r.b, steps), ceil_div(tokens, steps * ceil_div(r.b, steps))
        behind = max(r.new - ceil_div((step + 1) * r.new, steps), 0) if b == 1 and r.causal else 0
        try:
            decode_us += _decode_us(r, b, new, r.length - behind, device)
        except (UnsupportedError, ValueError):
            return None
    weights = d.heads * d.kv_lora * (d.nope + d.v)
    through = tokens * d.heads * (2 * d.kv_lora + d.nope + d.v)
    products = Products(2 * tokens * weights, (steps * weights + through) * r.dtype.itemsize)
    return AbsorbedWork(steps, decode_us, products)


def _decode_us(r: Request, b: int, new: int, length: int, device: Device) -> float:
    problem = Problem.from_sizes(
        b=b, s_q=new, h_q=r.dims.heads, d_qk=r.dims.d_qk, d_v=r.dims.d_v, dtype=r.dtype,
        page_size=r.page_size, max_pages=ceil_div(length, r.page_size),
    )  # fmt: skip
    variant = dispatch.choose(problem, device, None)
    found = model(variant, problem.kind, device)
    assert found is not None
    sizes = (b, problem.rows, length, variant.block_rows, variant.block_n)
    return found.us(_mla.cut(*sizes, device.sm_count))


def expanded_work(r: Request, sm_count: int, cudnn: bool) -> ExpandedWork:
    d, size = r.dims, r.dtype.itemsize
    most, exact = expanded_steps.cut_limits(
        expanded_steps.limits(d, r.dtype, fuses=True, workspace_bytes=r.workspace_bytes), cudnn
    )
    requests = seen_requests([r.length], [0, r.new], [0], r.causal)
    made = chunks(requests, most, exact)
    shared = 1
    if len(made) == 1 and not any(part.exact for part in made[0].parts):
        shared = max(1, min(r.b, most.queries // max(r.new, 1), most.kv // max(r.length, 1)))
    kv = sum(chunk.tokens for chunk in made)
    weights = d.heads * d.kv_lora * (d.nope + d.v)
    moved = kv * (2 * d.d_qk + d.heads * d.rope)
    cudnn_flop = flash_flop = 0.0
    for part in (part for chunk in made for part in chunk.parts):
        queries = part.queries.stop - part.queries.start
        moved += queries * d.heads * (2 * d.head_dim + 3 * d.v)
        if part.exact:
            cudnn_flop += _busy_flop(part, d, CUDNN_ROWS, 1, sm_count)
        else:
            flash_flop += _busy_flop(part, d, FLASH_ROWS, shared, sm_count)
    products = Products(
        2 * r.b * kv * weights,
        (len(made) / shared * weights + kv * d.heads * (d.nope + d.v)) * r.b * size,
    )
    return ExpandedWork(
        r.b / shared * len(made),
        r.b / shared * sum(len(chunk.parts) for chunk in made),
        products,
        r.b * moved * size,
        r.b * cudnn_flop,
        r.b * flash_flop,
    )


def _busy_flop(part: Part, d: Dims, rows: int, shared: int, sm_count: int) -> float:
    """What all SMs could do in the time of an attention that `shared` requests have."""
    queries, keys = part.queries.stop - part.queries.start, part.keys.stop - part.keys.start
    tiles = ceil_div(queries, rows) * d.heads * shared
    tile_flop = 2 * rows * keys * (d.head_dim + d.v)
    if part.causal:  # tiles of all lengths, the longest at the end
        mean = (keys - queries / 2) / keys
        rounds = tiles * mean / sm_count + 1 - mean if tiles > sm_count else 1.0
    else:
        rounds = float(ceil_div(tiles, sm_count))
    busy: float = rounds * sm_count * tile_flop / shared
    return busy
