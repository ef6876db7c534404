"""The schedule that the calls of a step share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import launch
from ...checks import wrong
from ...errors import UnsupportedError
from ...plan import Plan, plan


class Sizes(NamedTuple):
    """What all calls with one FlashMLASchedMeta share."""

    b: int
    s_q: int
    h_q: int
    d_qk: int
    page_block_size: int
    h_kv: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class FlashMLASchedMeta:
    """Empty until the first call with it, which makes the schedule of all that follow.

    So they must have its sizes and its lengths: a step of a model, all layers of it. The schedule
    is made again when a CUDA graph is being captured and it was not before, and the reverse, so
    that the graph makes its own at every replay.
    """

    have_initialized: bool = False
    config: Sizes | None = None
    plan: Plan | None = None
    made_for: tuple[bool, int] = (False, 0)  # whether in a graph, and columns of the block table
    # FlashMLA's schedule is here. Ours is not it; one that the caller made is refused.
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


def schedule_of(
    meta: FlashMLASchedMeta, sizes: Sizes, cache_seqlens: Tensor, max_pages: int
) -> Plan:
    """The schedule of the calls with `meta`, made if there is none that is good here."""
    if meta.tile_scheduler_metadata is not None or meta.num_splits is not None:
        raise UnsupportedError(
            "tile_scheduler_metadata: got one with a schedule that the caller made, "
            "expected one as get_mla_metadata() returned it",
            {},
        )
    if meta.have_initialized and meta.config is not None:
        for name, before, now in zip(Sizes._fields, meta.config, sizes, strict=True):
            if before != now:
                raise wrong(
                    "tile_scheduler_metadata",
                    f"one of calls with {name} = {before}",
                    f"{name} = {now} as in this call, or a new one of get_mla_metadata()",
                )
    made_for = (sizes.device.type == "cuda" and launch.capturing(sizes.device), max_pages)
    if meta.plan is None or not meta.have_initialized or meta.made_for != made_for:
        # A new one, never an update: a graph's memory is its own, and what it reads must be, too.
        meta.plan = plan(
            cache_seqlens,
            s_q=sizes.s_q,
            h_q=sizes.h_q // sizes.h_kv,
            d_qk=sizes.d_qk,
            dtype=sizes.dtype,
            page_size=sizes.page_block_size,
            max_pages=max_pages,
        )
        meta.made_for, meta.config, meta.have_initialized = made_for, sizes, True
    return meta.plan
