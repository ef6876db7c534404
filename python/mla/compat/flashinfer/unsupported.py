"""What FlashInfer's wrapper has and mla has not."""

from __future__ import annotations

import torch

from ...checks import dtype_name
from ...errors import UnsupportedError
from .. import refusal

MISSING = {
    "use_profiler": "profiler in its kernels",
    "profiler_buffer": "profiler in its kernels",
    "skip_softmax": "tokens left out by a threshold",
    "use_sinks": "attention sinks",
    "output_dtype": "outputs of another dtype than the query's",
    "output_scale": "8-bit outputs",
    "o_scale": "8-bit outputs",
    "scale_mode": "8-bit caches",
    "ckv_scale": "8-bit caches",
    "ckv_scale_arr": "8-bit caches",
    "kpe_scale": "8-bit caches",
    "kv_len": "form of run() without plan()",
    "page_table": "form of run() without plan()",
}


def refuse(**given: object) -> None:
    refusal.refuse(MISSING, **given)


def refuse_dtypes(q: torch.dtype, kv: torch.dtype) -> None:
    """UnsupportedError for those that are sound for FlashInfer, TypeError for others."""
    for name, dtype, what in (
        ("q_data_type", q, "8-bit queries"),
        ("kv_data_type", kv, "8-bit caches"),
    ):
        if isinstance(dtype, torch.dtype) and dtype.itemsize == 1:
            refusal.unsupported(name, what)
        dtype_name(dtype, of=name)
    if q != kv:
        raise UnsupportedError(f"kv_data_type: got {kv}, expected {q} as q_data_type", {})
