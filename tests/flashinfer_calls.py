"""Cases as FlashInfer's wrapper takes them, on any device, and what it must return."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
from cases import DTYPES, Case, Inputs
from compare import check, reference
from mla.compat.flashinfer import BatchMLAPagedAttentionWrapper, MLAPlanMetadata
from torch import Tensor

FORMS = ("flat", "csr", "dense", "dual")
LN_2 = math.log(2)


def offsets(lens: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=device)


def pages_of(case: Case) -> tuple[int, ...]:
    return tuple(-(-n // case.page_size) for n in case.seq_lens)


def csr(inputs: Inputs, *, control: torch.device | str | None = None) -> dict[str, Tensor]:
    """The flat form, offsets and lengths on the device `control`; absurd ids behind the last."""
    case, device = inputs.case, inputs.rows.device
    control = device if control is None else control
    ids = [row[:n] for row, n in zip(inputs.block_table, pages_of(case), strict=True)]
    behind = torch.full((3,), 2147480000, dtype=torch.int32, device=device)
    return {
        "qo_indptr": offsets(case.query_lens, control),
        "kv_indptr": offsets(pages_of(case), control),
        "kv_indices": torch.cat([*ids, behind]),
        "kv_len_arr": inputs.seq_lens.to(control),
    }


def dense(inputs: Inputs) -> dict[str, Tensor]:
    return {
        "cum_seq_lens_q": offsets(inputs.case.query_lens, inputs.rows.device),
        "block_tables": inputs.block_table,
        "seq_lens": inputs.seq_lens,
    }


def sizes(case: Case) -> dict[str, Any]:
    return {
        "num_heads": case.h_q,
        "head_dim_ckv": case.d_v,
        "head_dim_kpe": case.d_qk - case.d_v,
        "page_size": case.page_size,
        "causal": case.causal,
        "sm_scale": case.scale,
        "q_data_type": DTYPES[case.dtype],
        "kv_data_type": DTYPES[case.dtype],
    }


def wrapper_on(device: torch.device | str, **options: Any) -> BatchMLAPagedAttentionWrapper:
    workspace = torch.empty(1, dtype=torch.int8, device=device)
    return BatchMLAPagedAttentionWrapper(workspace, **options)


def plan(wrapper: BatchMLAPagedAttentionWrapper, inputs: Inputs, form: str) -> None:
    metadata = {
        "csr": lambda: MLAPlanMetadata.csr(**csr(inputs)),
        "dense": lambda: MLAPlanMetadata.dense(**dense(inputs)),
        "dual": lambda: MLAPlanMetadata.dual(**csr(inputs), **dense(inputs)),
    }
    if form == "flat":
        wrapper.plan(*csr(inputs).values(), *sizes(inputs.case).values())
    else:
        wrapper.plan(metadata=metadata[form](), lse_mode="base2", **sizes(inputs.case))


def run(
    wrapper: BatchMLAPagedAttentionWrapper, inputs: Inputs, form: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """With the query and the cache of the case, split or not, and base-2 lse."""
    options |= {"return_lse": True}
    if form == "flat":
        return wrapper.run(*split(inputs.q, inputs), *split(inputs.kv_cache, inputs), **options)
    return wrapper.run(query=inputs.q, kv_cache=inputs.kv_cache, **options)


def split(rows: Tensor | tuple[Tensor, Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The two parts of a packed tensor, as slices of it."""
    d_v = inputs.case.d_v
    return rows if isinstance(rows, tuple) else (rows[..., :d_v], rows[..., d_v:])


def buffers(case: Case, capacity: int, device: torch.device | str) -> dict[str, Tensor]:
    b = len(case.seq_lens)
    sizes = {"qo_indptr": b + 1, "kv_indptr": b + 1, "kv_indices": capacity, "kv_len_arr": b}
    return {n: torch.zeros(k, dtype=torch.int32, device=device) for n, k in sizes.items()}


def check_base_2(inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    """Holds (out, base-2 lse) to float64; rows that no request has are left out."""
    used = sum(inputs.case.query_lens)
    out, lse = (tensor[:used] for tensor in result)
    check((out, lse * LN_2), reference(inputs), inputs.case.scale)
