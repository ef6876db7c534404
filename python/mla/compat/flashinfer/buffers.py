"""What a graph reads: the buffers that a caller reserved, and a block table beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_index, wrong
from .pages import reserved_beside
from .requests import Requests, Step


class Buffers:
    """Of one wrapper. Their addresses stay from plan to plan."""

    def __init__(
        self,
        qo_indptr: Tensor | None,
        kv_indptr: Tensor | None,
        kv_indices: Tensor | None,
        kv_len_arr: Tensor | None,
        device: torch.device,
    ) -> None:
        if qo_indptr is None or kv_indptr is None or kv_indices is None or kv_len_arr is None:
            expected = "qo_indptr, kv_indptr, kv_indices and kv_len_arr with it"
            raise wrong("use_cuda_graph", "True without its buffers", expected)
        check_index("kv_len_arr", kv_len_arr, (None,), device, "[b]")
        self.b = kv_len_arr.shape[0]
        check_index("qo_indptr", qo_indptr, (self.b + 1,), device, "[{}], b + 1")
        check_index("kv_indptr", kv_indptr, (self.b + 1,), device, "[{}], b + 1")
        check_index("kv_indices", kv_indices, (None,), device, "[pages]")
        self.qo_indptr, self.kv_indptr = qo_indptr, kv_indptr
        self.kv_indices, self.kv_len_arr = kv_indices, kv_len_arr
        self._reserved = reserved_beside(kv_indices)
        self.table = self._reserved.table(self.b)

    def take(self, requests: Requests, most: int | None = None) -> Step:
        """Writes them here. ValueError if there is no room, `most` being that of query tokens."""
        pages, width = requests.pages, self.table.shape[1]
        if pages.b != self.b:
            raise wrong("kv_len_arr", f"{pages.b} requests", f"{self.b} as the wrapper's buffer")
        if pages.longest > width:
            room = f"at most {width} with a buffer of {self.kv_indices.shape[0]}"
            raise wrong("kv_indices", f"a request of {pages.longest} pages", room)
        if most is not None and requests.total_q > most:
            got = f"{requests.total_q} query tokens"
            raise wrong("qo_indptr", got, f"at most {most}, as the wrapper's first plan")
        self.qo_indptr.copy_(requests.cu_seqlens_q)
        self.kv_len_arr.copy_(requests.seq_lens)
        pages.write(self.table)
        return Step(self.table, self.kv_len_arr, self.qo_indptr)
