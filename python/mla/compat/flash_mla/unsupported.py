"""What FlashMLA has and mla has not."""

from __future__ import annotations

from typing import NoReturn

from .. import refusal

MISSING = {
    "is_fp8_kvcache": "8-bit caches",
    "descale_q": "8-bit queries",
    "descale_k": "8-bit caches",
    "indices": "sparse attention",
    "topk": "sparse attention",
    "topk_length": "sparse attention",
    "attn_sink": "attention sinks",
    "extra_k_cache": "a second cache",
    "extra_indices_in_kvcache": "a second cache",
    "extra_topk_length": "a second cache",
    "flash_mla_sparse_fwd": "sparse attention",
    "flash_attn_varlen_func": "prefill",
    "flash_attn_varlen_kvpacked_func": "prefill",
    "flash_attn_varlen_qkvpacked_func": "prefill",
}


def refuse(**given: object) -> None:
    refusal.refuse(MISSING, **given)


def _unsupported(name: str) -> NoReturn:
    refusal.unsupported(name, MISSING[name])


# Here so that an import line with FlashMLA's other names works. Each raises UnsupportedError.


def flash_mla_sparse_fwd(*args: object, **kwargs: object) -> NoReturn:
    _unsupported("flash_mla_sparse_fwd")


def flash_attn_varlen_func(*args: object, **kwargs: object) -> NoReturn:
    _unsupported("flash_attn_varlen_func")


def flash_attn_varlen_kvpacked_func(*args: object, **kwargs: object) -> NoReturn:
    _unsupported("flash_attn_varlen_kvpacked_func")


def flash_attn_varlen_qkvpacked_func(*args: object, **kwargs: object) -> NoReturn:
    _unsupported("flash_attn_varlen_qkvpacked_func")
