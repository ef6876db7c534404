"""Why a problem runs the way it does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import costs
from . import workspace as workspaces
from .checks import check_size
from .device import Device, facts, resolve
from .dispatch import Choice, Forced, forced, refusal, weigh
from .errors import UnsupportedError
from .estimate import Estimate, ceil_div, floor_us
from .inputs import Inputs, TensorOrPair
from .plan import Plan, given
from .problem import Problem
from .variants import Variant


@dataclass(frozen=True)
class Explanation:
    """What the dispatcher thinks of a problem. `str()` is a report."""

    problem: Problem
    device: Device
    choice: Choice

    @property
    def variant(self) -> Variant | None:
        """The one that runs; None if a call would raise UnsupportedError."""
        return self.choice.variant

    @property
    def reasons(self) -> dict[str, list[str]]:
        """By name of each variant that cannot run, why not."""
        return self.choice.reasons

    @property
    def estimate(self) -> Estimate | None:
        """Predicted microseconds and what bounds them; None on a CPU or without a variant."""
        return self.choice.estimates[self.variant.name] if self.variant else None

    @property
    def floor_us(self) -> float | None:
        """Microseconds that no kernel beats by the GPU's published figures; None on a CPU."""
        return floor_us(self.problem, self.device)

    @property
    def costs(self) -> str | None:
        """Where the constants of the predictions come from, in a clause; None on a CPU."""
        return costs.of(self.device).source if self.device.type == "cuda" else None

    @property
    def error(self) -> UnsupportedError | None:
        """What a call would raise."""
        return None if self.variant else refusal(self.problem, self.device, self.choice)

    @property
    def workspace_bytes(self) -> int:
        """Needed by a call without a plan."""
        if self.variant is None:
            return 0
        return workspaces.bytes_needed(
            self.variant, self.problem, self.device.sm_count, planned_len=None
        )

    def why(self) -> str:
        """One clause."""
        if self.choice.forced:
            return f"forced by {self.choice.forced.by}"
        able = len(self.choice.estimates)
        if able == 1:
            return "the only one that can run it"
        if self.problem.batch_invariant:
            return f"by heads, dims and dtype alone, of the {able} that can run it"
        return f"predicted to be the fastest of the {able} that can run it"

    def headline(self) -> str:
        if self.variant is None:
            return (
                "no variant"
                if self.choice.forced is None
                else f"no variant: {self.choice.forced} cannot run"
            )
        predicted = "" if self.estimate is None else f", {_predicted(self.estimate)}"
        return f"{self.variant.name} ({self.why()}{predicted})"

    def __str__(self) -> str:
        lines = [
            f"problem    {self.problem}",
            f"device     {self.device}",
            f"variant    {self.headline()}",
        ]
        if self.estimate:
            lines.append(f"time       {_parts(self.estimate)}")
        if self.floor_us:
            lines.append(f"floor      {self.floor_us:.1f} us by the GPU's published figures")
        if self.costs:
            lines.append(f"constants  {self.costs}")
        if self.variant and not self.variant.on_host:
            rows, height = self.problem.rows, self.variant.block_rows
            lines += [
                f"tiles      {rows} query rows a request, {ceil_div(rows, height)} x {height}",
                f"workspace  {self.workspace_bytes} bytes",
            ]
        lines.append("others" if self.variant else "variants")
        width = max(map(len, [*self.choice.estimates, *self.reasons]))
        for name, predicted in self.choice.estimates.items():
            if name != (self.variant and self.variant.name):
                lines.append(f"  {name:{width}}  could run, {_predicted(predicted)}")
        for name, why_not in self.reasons.items():
            lines.append(f"  {name:{width}}  {'; '.join(why_not)}")
        return "\n".join(lines)


def _predicted(estimate: Estimate | None) -> str:
    if estimate is None:
        return "time not predicted"
    return f"predicted {estimate.us:.1f} us, {estimate.bound} bound"


def _parts(estimate: Estimate) -> str:
    return (
        f"memory {estimate.memory_us:.1f} us beside tiles {estimate.compute_us:.1f} us, "
        f"starting and merging {estimate.latency_us:.1f} us"
    )


def of_problem(problem: Problem, device: Device, request: Forced | None) -> Explanation:
    return Explanation(problem, device, weigh(problem, device, request))


def explain(
    q: TensorOrPair | None = None,
    kv_cache: TensorOrPair | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    d_v: int | None = None,
    batch_invariant: bool = False,
    max_seq_len: int | None = None,
    variant: str | None = None,
    b: int = 1,
    s_q: int = 1,
    h_q: int = 128,
    kv_len: int = 4096,
    d_qk: int = 576,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 64,
    device: Device | torch.device | str | int | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Explanation:
    """Which variant runs a call, why, what each other lacks, and the predicted time.

    Give either the tensors of a `decode` call or sizes: b, s_q, h_q, kv_len (tokens that the block
    table reaches), d_qk, dtype, page_size and `device`, which may be a torch device, the name of a
    known GPU such as "RTX 3090", or a `Device`. A `plan` goes with tensors. What follows it decides
    nothing, and is there so that a call of `decode` can be asked about as it is.

    TypeError and ValueError as `decode`; what `decode` would refuse with UnsupportedError is in the
    report.
    """
    if q is not None and kv_cache is not None and block_table is not None and seq_lens is not None:
        inputs = Inputs.of(q, kv_cache, block_table, seq_lens, cu_seqlens_q)
        problem = Problem.from_tensors(inputs, d_v, batch_invariant, max_seq_len)
        request = forced(variant)
        if plan is not None:
            given(plan).check_fits(problem, inputs.q.device, request)
            request = Forced(plan.variant.name, "its plan")
        return of_problem(problem, facts(inputs.q.device), request)
    if plan is not None or not q is kv_cache is block_table is seq_lens is None:
        raise TypeError(
            "explain: got some of q, kv_cache, block_table, seq_lens, expected all of them or none"
        )
    page_size, kv_len = check_size("page_size", page_size, 1), check_size("kv_len", kv_len, 0)
    problem = Problem.from_sizes(
        b=b,
        s_q=s_q,
        h_q=h_q,
        d_qk=d_qk,
        dtype=dtype,
        page_size=page_size,
        max_pages=ceil_div(kv_len, page_size),
        batch_invariant=batch_invariant,
        max_seq_len=max_seq_len,
    )
    return of_problem(problem, resolve(device), forced(variant))
