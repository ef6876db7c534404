"""The wrapper: requests are planned once a step, then every layer runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...api import decode
from ...checks import check_scale, check_tensor
from .arguments import Sizes, Structural, base_is_e, check_choice, check_needed, structural
from .buffers import Buffers
from .metadata import MLAPlanMetadata, one_form
from .planned import Planned
from .replan import CachedModule
from .unsupported import refuse

BACKENDS = (
    *("auto", "fa2", "fa3", "cutlass", "cutile", "trtllm-gen", "xqa"),
    *("cute-dsl", "cute-dsl-monolithic", "cute-dsl-modular"),
)
LOG2_E = math.log2(math.e)


class BatchMLAPagedAttentionWrapper:
    """FlashInfer's: `plan` the requests of a step, then `run` every layer.

    float_workspace_buffer: names the device. Its memory is not used.
    use_cuda_graph: keeps all addresses, so that a replayed graph of `run` does what was planned
        last. b and sizes stay, and so does the number of query tokens, which later plans may leave
        some of without a request.
    qo_indptr, kv_indptr, kv_indices, kv_len_arr: int32 buffers for a graph, [b + 1], [b + 1],
        [pages] and [b]. A block table of as many entries as kv_indices, or of 1 MiB, is made beside
        them, and shared by wrappers with the same kv_indices. A request may have a b-th of it.
    backend: one of FlashInfer's names. All mean mla's own choice of a variant.
    enable_cuda_graph_plan_update: `update_cuda_graph_plan` works in any case.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
        *,
        enable_cuda_graph_plan_update: bool = False,
    ) -> None:
        check_tensor("float_workspace_buffer", float_workspace_buffer)
        check_choice("backend", backend, BACKENDS)
        self.device = float_workspace_buffer.device
        buffers = None
        if use_cuda_graph:
            buffers = Buffers(qo_indptr, kv_indptr, kv_indices, kv_len_arr, self.device)
        self._planned = Planned(self.device, buffers)
        self._options: dict[str, Any] = {}
        self._lse_mode: str | None = None
        if buffers is not None:  # what SGLang's own plan reaches for
            self._cached_module = CachedModule(self._planned.update, buffers.kv_indices)
            self._float_workspace_buffer = float_workspace_buffer
            self._int_workspace_buffer = self._pin_memory_int_workspace_buffer = None
            self._qo_indptr_buf, self._kv_indptr_buf = buffers.qo_indptr, buffers.kv_indptr
            self._kv_indices_buf, self._kv_len_arr_buf = buffers.kv_indices, buffers.kv_len_arr

    def plan(
        self,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        num_heads: int | None = None,
        head_dim_ckv: int | None = None,
        head_dim_kpe: int | None = None,
        page_size: int | None = None,
        causal: bool | None = None,
        sm_scale: float | None = None,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
        use_profiler: bool = False,
        *,
        metadata: MLAPlanMetadata | None = None,
        cum_seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        max_q_len: int | None = None,
        query_layout: str | None = None,
        kv_cache_layout: str | None = None,
        lse_mode: str = "none",
        output_dtype: torch.dtype | None = None,
        output_scale: str = "none",
        scale_mode: str = "default",
        skip_softmax: bool = False,
        use_sinks: bool = False,
    ) -> None:
        """Chooses a variant and schedules a step. Waits if offsets or lengths are on the device.

        metadata: the requests; or the tensors of one form, by the names and in the order that
            `MLAPlanMetadata` has.
        num_heads .. kv_data_type: as in FlashInfer, all of them. head_dim_kpe may be 0.
        query_layout, kv_cache_layout: "packed" or "split"; `run` takes either, whatever they say.
        lse_mode: what `run` returns of lse, "none", "base2" or "basee". "none" with tensors in
            place of metadata leaves it to `run`.

        TypeError, ValueError and UnsupportedError as `mla.plan`; UnsupportedError for every other
        argument that is given.
        """
        refuse(
            use_profiler=use_profiler or None,
            output_dtype=None if output_dtype == q_data_type else output_dtype,
            output_scale=None if output_scale == "none" else output_scale,
            scale_mode=None if scale_mode == "default" else scale_mode,
            skip_softmax=skip_softmax or None,
            use_sinks=use_sinks or None,
        )
        flat = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        dense = (cum_seq_lens_q, block_tables, seq_lens, max_q_len)
        requests = one_form(metadata, MLAPlanMetadata(*flat, *dense))
        check_needed(causal=causal, sm_scale=sm_scale)
        check_scale(sm_scale, "sm_scale")
        sizes = Sizes.of(
            num_heads, head_dim_ckv, head_dim_kpe, page_size, q_data_type, kv_data_type
        )
        for name, layout in (("query_layout", query_layout), ("kv_cache_layout", kv_cache_layout)):
            check_choice(name, layout, (None, "packed", "split"))
        check_choice("lse_mode", lse_mode, ("none", "base2", "basee"))
        self._planned.renew(requests, sizes)
        self._options = {"scale": sm_scale, "causal": causal, "d_v": head_dim_ckv}
        self._lse_mode = None if metadata is None and lse_mode == "none" else lse_mode

    def update_cuda_graph_plan(self, *, metadata: MLAPlanMetadata) -> None:
        """`plan` with other requests and all else as it was, of a wrapper for graphs."""
        self._planned.update(one_form(metadata, MLAPlanMetadata()))

    def run(
        self,
        q_nope: Tensor | None = None,
        q_pe: Tensor | None = None,
        ckv_cache: Tensor | None = None,
        kpe_cache: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: Tensor | None = None,
        kv_len: Tensor | None = None,
        page_table: Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        query: Structural | None = None,
        kv_cache: Structural | None = None,
        ckv_scale: float | None = None,
        ckv_scale_arr: Tensor | None = None,
        kpe_scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Decodes with `mla.decode`: on the current stream, without synchronisation, capturable.

        query: [tokens, num_heads, ckv + kpe], or the pair of its parts; or q_nope and q_pe.
        kv_cache: [pages, page_size, ckv + kpe], or the pair; or ckv_cache and kpe_cache. The rank
            may be 4, with one KV head, and strides are free as in `mla.decode`.
        out: [tokens, num_heads, ckv]. lse: float32 [tokens, num_heads]. To write to, if given.

        Returns out, or (out, lse) with `return_lse`: base 2, or e with `return_lse_base_on_e` or a
        plan that says so. Rows that see no token give 0 and -inf.

        RuntimeError before `plan`; TypeError, ValueError and UnsupportedError as `mla.decode`, by
        whose names some messages call the arguments.
        """
        refuse(
            profiler_buffer=profiler_buffer,
            kv_len=kv_len,
            page_table=page_table,
            o_scale=o_scale,
            ckv_scale=ckv_scale,
            ckv_scale_arr=ckv_scale_arr,
            kpe_scale=kpe_scale,
        )
        planned = self._planned
        if planned.sizes is None:
            raise RuntimeError("run: got no plan, expected a call of plan() before it")
        rope = planned.sizes.head_dim_kpe
        q = structural("query", query, {"q_nope": q_nope, "q_pe": q_pe}, rope)
        parts = {"ckv_cache": ckv_cache, "kpe_cache": kpe_cache}
        cache = structural("kv_cache", kv_cache, parts, rope)
        call: dict[str, Any] = {**planned.step._asdict(), **self._options, "plan": planned.plan}
        if not return_lse and lse is None:
            only: Tensor = decode(q, cache, **call, out=out)
            return only
        natural = base_is_e(self._lse_mode, return_lse_base_on_e)
        out, lse = decode(q, cache, **call, out=out, lse=lse, return_lse=True)
        if not natural:
            lse.mul_(LOG2_E)
        return (out, lse) if return_lse else out
