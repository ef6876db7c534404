"""FlashMLA's dense decode: `from mla.compat import flash_mla` in place of `import flash_mla`.

Both of its calling forms, with its conventions: `softmax_scale` is d_qk ** -0.5 and `causal` is
False unless they are given, lse is [b, h_q, s_q], and +inf for rows that see no token. What it has
beside dense decode raises `mla.UnsupportedError`. Every page size and head count will do.
"""

from .flash_mla_interface import (
    FlashMLASchedMeta,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
