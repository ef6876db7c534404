"""How SGLang plans between two replays: past `plan`, by what that calls in FlashInfer.

Its `fast_mla_decode_plan` takes the place of a wrapper's `plan`, hands the wrapper's workspaces,
offsets and lengths on the host to `_cached_module.plan`, and has written page ids into the buffer
for graphs before. So wrappers for graphs have these names, and here is what the call does.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .metadata import MLAPlanMetadata


class CachedModule:
    def __init__(self, replan: Callable[[MLAPlanMetadata], None], kv_indices: Tensor) -> None:
        self._replan = replan
        self._kv_indices = kv_indices

    def plan(
        self,
        float_workspace: object,
        int_workspace: object,
        pinned_workspace: object,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_len_arr: Tensor,
        *sizes: object,
    ) -> None:
        """Other requests of the same sizes."""
        self._replan(MLAPlanMetadata.csr(qo_indptr, kv_indptr, self._kv_indices, kv_len_arr))
