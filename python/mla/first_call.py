"""A call of `decode` unlike those before: tensors, problem, variant, launch.

Here is every check and every choice. What comes out is a prepared call of the extension, which
calls of the same layouts and options then use without coming here (src/prepared.cpp).
"""

from __future__ import annotations

from torch import Tensor

from . import _mla, cpu, launch, log, outputs, validate
from . import workspace as workspaces
from .checks import DTYPES, check_scale
from .device import Device, facts
from .dispatch import choose, chooser, forced
from .explain import of_problem
from .inputs import Inputs, TensorOrPair
from .plan import Plan, given
from .problem import Problem
from .variants import Variant


def decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    workspace: Tensor | None,
    plan: Plan | None,
    scale: float,
    causal: bool,
    d_v: int | None,
    return_lse: bool,
    batch_invariant: bool,
    max_seq_len: int | None,
    variant: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mla.decode`, but for the calls that are prepared."""
    inputs = Inputs.of(q, kv_cache, block_table, seq_lens, cu_seqlens_q)
    problem = Problem.from_tensors(inputs, d_v, batch_invariant, max_seq_len)
    scale = check_scale(scale)
    target = inputs.q.device
    device = facts(target)
    request = forced(variant)
    if plan is None:
        chosen = choose(problem, device, request)
    else:
        given(plan).check_fits(problem, target, request)
        chosen = plan.variant
    planned_len = problem.max_len if plan is None else plan.max_len
    if workspace is not None:
        needed = workspaces.bytes_needed(
            chosen, problem, device.sm_count, None if plan is None else planned_len
        )
        workspaces.check(workspace, needed, target)
    outputs.check(problem, inputs, out, lse, workspace)
    if validate.wanted() and not (device.type == "cuda" and launch.capturing(target)):
        validate.check_values(inputs, problem)
    if log.dispatch_wanted():
        _log_choice(problem, device, chosen, variant)

    max_len = min(planned_len, problem.max_len)
    empty = problem.b == 0 or problem.total_q == 0 or max_len == 0 or inputs.kv.shape[0] == 0
    if empty or chosen.on_host:
        out, lse = outputs.complete(problem, inputs, out, lse, return_lse)
        if empty:
            outputs.fill_empty(out, lse)
        else:
            cpu.decode(problem, inputs, out, lse, scale=scale, causal=causal, max_len=max_len)
        return (out, lse) if return_lse and lse is not None else out
    result: Tensor | tuple[Tensor, Tensor] = _mla.decode_first(
        q,
        kv_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        out,
        lse,
        workspace,
        plan,
        scale,
        bool(causal),
        None if d_v is None else problem.d_v,
        bool(return_lse),
        problem.batch_invariant,
        problem.max_seq_len,
        "" if request is None else request.name,
        chosen.name,
        DTYPES[problem.dtype],
        launch.ordinal(target),
        launch.sizes(problem, num_workers=device.sm_count, max_len=planned_len),
        chooser(problem, device, request) if plan is None else None,
    )
    return result


def _log_choice(problem: Problem, device: Device, chosen: Variant, variant: str | None) -> None:
    kind = (
        problem.h_q,
        problem.s_q,
        problem.ragged,
        problem.d_qk,
        problem.dtype,
        problem.page_size,
        problem.batch_invariant,
    )
    log.once((device, chosen.name, kind), lambda: _choice_line(problem, device, chosen, variant))


def _choice_line(problem: Problem, device: Device, chosen: Variant, variant: str | None) -> str:
    explanation = of_problem(problem, device, forced(variant))
    what = (
        explanation.headline() if explanation.variant == chosen else f"{chosen.name} (by its plan)"
    )
    return f"{what} on {device} for {problem}"
