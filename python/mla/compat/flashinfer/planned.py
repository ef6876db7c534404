"""What a wrapper was told by its last plan, and where it is."""

from __future__ import annotations

import torch

from ...plan import Plan, plan
from .arguments import Sizes
from .buffers import Buffers
from .metadata import MLAPlanMetadata
from .requests import Step, read


class Planned:
    """Without buffers all is made anew by each plan, else only the first time."""

    def __init__(self, device: torch.device, buffers: Buffers | None) -> None:
        self.device = device
        self.buffers = buffers
        self.sizes: Sizes | None = None
        self.plan: Plan | None = None
        self.step: Step

    def renew(self, given: MLAPlanMetadata, sizes: Sizes) -> None:
        """Plans these requests. What was planned before stays if there is an error in them."""
        if self.buffers is not None:
            sizes.check_same(self.sizes)
        requests = read(given, sizes.page_size, self.device)
        if self.buffers is not None and self.plan is not None:
            self.step = self.buffers.take(requests, self.plan.problem.total_q)
            self.plan.update(self.step.seq_lens)
            return
        self.step = (
            requests.step(self.device) if self.buffers is None else self.buffers.take(requests)
        )
        self.plan = plan(
            self.step.seq_lens,
            h_q=sizes.num_heads,
            d_qk=sizes.head_dim_ckv + sizes.head_dim_kpe,
            dtype=sizes.q_data_type,
            page_size=sizes.page_size,
            cu_seqlens_q=self.step.cu_seqlens_q,
            total_q=requests.total_q,
            max_pages=self.step.block_table.shape[1],
            # What a graph is captured with says nothing of what it will be replayed with.
            max_seq_len=requests.longest if self.buffers is None else None,
        )
        self.sizes = sizes

    def update(self, given: MLAPlanMetadata) -> None:
        """Other requests, of the same sizes, between two replays of a graph."""
        if self.buffers is None or self.sizes is None:
            raise RuntimeError(
                "update_cuda_graph_plan: got a wrapper without a plan for graphs, expected "
                "use_cuda_graph=True and a call of plan() before"
            )
        self.renew(given, self.sizes)
