"""The schedule of a decode call, made ahead: one for all layers of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _mla, launch
from . import workspace as workspaces
from .checks import DTYPES, INT32_MAX, check_lengths, check_size, check_tensor, shape_of, wrong
from .device import facts
from .dispatch import Forced, choose, forced
from .problem import Problem
from .variants import Variant

# Of a problem: what a plan must share with the calls that it is for.
PLANNED = ("b", "ragged", "s_q", "total_q", "h_q", "d_qk", "dtype", "page_size", "batch_invariant")


class Plan:
    """A split-KV schedule in device memory, for one variant and one set of sizes.

    It depends on the lengths, not on q, the cache or the block table. `update` writes the schedule
    of other lengths in place, in a captured graph too. It follows the current stream, as every
    torch operation does. For CPU tensors there is nothing to schedule, and the same code runs.
    """

    def __init__(
        self,
        problem: Problem,
        variant: Variant,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor | None,
        bounded: bool,
    ) -> None:
        self.problem = problem
        self.variant = variant
        self.device = seq_lens.device
        self.num_workers = facts(self.device).sm_count
        self.max_len = problem.max_len if bounded else _mla.MAX_LEN
        self.schedule: Tensor | None = None  # where there is something to schedule
        self._schedule: _mla.Schedule | None = None
        if not variant.on_host and problem.total_q > 0:
            sizes = launch.sizes(problem, num_workers=self.num_workers, max_len=self.max_len)
            size = workspaces.schedule_bytes(variant, sizes)
            self.schedule = torch.zeros(size, dtype=torch.uint8, device=self.device)
            sizes.plan = self.schedule.data_ptr()
            self._schedule = _mla.Schedule(
                variant.name,
                DTYPES[problem.dtype],
                problem.page_size,
                sizes,
                launch.ordinal(self.device),
            )
        self._cu_seqlens_q = cu_seqlens_q
        self.update(seq_lens)

    def update(self, seq_lens: Tensor, cu_seqlens_q: Tensor | None = None) -> None:
        """Schedules other lengths, int32 [b], and of a ragged query other `cu_seqlens_q`, [b + 1].

        Without the latter, the tensor that was given before is read again. Does not synchronise.
        """
        cuts = self._cu_seqlens_q if cu_seqlens_q is None else cu_seqlens_q
        schedule = self._schedule
        if schedule is None or not schedule.update(seq_lens, cuts):
            self._check_update(seq_lens, cuts)
            if schedule is not None:
                schedule.update_checked(seq_lens, cuts)
        self._cu_seqlens_q = cuts

    def _check_update(self, seq_lens: Tensor, cu_seqlens_q: Tensor | None) -> None:
        if cu_seqlens_q is not None and not self.problem.ragged:
            raise wrong(
                "cu_seqlens_q", shape_of(cu_seqlens_q), "none: the plan is for a uniform query"
            )
        check_lengths(seq_lens, cu_seqlens_q, self.problem.b, self.device)

    def check_fits(self, problem: Problem, device: torch.device, request: Forced | None) -> None:
        """ValueError if it is not for the call."""
        for name in PLANNED:
            planned, called = getattr(self.problem, name), getattr(problem, name)
            if planned != called:
                raise wrong(
                    "plan", f"a plan for {name} = {planned}", f"{name} = {called} as in the call"
                )
        if self.device != device:
            raise wrong("plan", f"a plan on {self.device}", f"{device} as the query")
        if request is not None and not request.admits(self.variant):
            raise wrong("plan", f"a plan for variant {self.variant.name}", f"variant {request}")

    def __repr__(self) -> str:
        return f"Plan({self.problem}; {self.variant.name} on {self.device})"


def given(plan: object) -> Plan:
    """TypeError if it is none."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected an mla.Plan")
    return plan


def plan(
    seq_lens: Tensor,
    *,
    h_q: int,
    d_qk: int,
    dtype: torch.dtype,
    page_size: int,
    s_q: int = 1,
    cu_seqlens_q: Tensor | None = None,
    total_q: int | None = None,
    max_pages: int | None = None,
    batch_invariant: bool = False,
    max_seq_len: int | None = None,
    variant: str | None = None,
) -> Plan:
    """Chooses a variant and schedules a step; pass the result to every `decode` of it.

    seq_lens: int32 [b] on the device, KV tokens of each request.
    h_q, d_qk, dtype, page_size: as the query and the cache will have.
    s_q: query tokens of each request. A ragged query has `cu_seqlens_q`, int32 [b + 1] on the
        device, and `total_q`, its number of tokens, instead.
    max_pages: columns of the block table, which lengths are clamped to. Without it, lengths beyond
        the block table's reach leave their requests' results undefined; no call reads outside the
        cache or the table either way.
    batch_invariant: as in the calls that it is for.
    max_seq_len: KV tokens of the longest request, where the host knows them: the variant is chosen
        for them. It limits nothing, now or at `update`.
    variant: a pipeline or a variant to force.

    TypeError, ValueError and UnsupportedError as `decode`.
    """
    check_tensor("seq_lens", seq_lens)
    check_lengths(seq_lens, cu_seqlens_q, None, seq_lens.device)
    page_size = check_size("page_size", page_size, 1)
    if cu_seqlens_q is not None and total_q is None:
        raise ValueError(
            "total_q: got None, expected the number of query tokens, q.shape[0], with cu_seqlens_q"
        )
    if cu_seqlens_q is None and total_q is not None:
        raise wrong(
            "total_q", total_q, "None without cu_seqlens_q: the query is uniform, b * s_q tokens"
        )
    problem = Problem.from_sizes(
        b=seq_lens.shape[0],
        h_q=h_q,
        d_qk=d_qk,
        dtype=dtype,
        page_size=page_size,
        max_pages=INT32_MAX // page_size if max_pages is None else max_pages,
        s_q=s_q,
        total_q=total_q,
        batch_invariant=batch_invariant,
        max_seq_len=max_seq_len,
    )
    chosen = choose(problem, facts(seq_lens.device), forced(variant))
    return Plan(problem, chosen, seq_lens, cu_seqlens_q, bounded=max_pages is not None)
