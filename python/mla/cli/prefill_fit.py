"""`mla fit --prefill`: the constants that the choice of prefill's way predicts by, from a sweep."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from datetime import date
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from mla import fused, prefill_costs, tuned
from mla.device import Device
from mla.prefill_choice import WORKSPACE_BYTES
from mla.prefill_costs import PrefillCosts
from mla.prefill_estimate import (
    AbsorbedWork,
    ExpandedWork,
    Request,
    absorbed_work,
    expanded_work,
)
from mla.prefill_times import METHODS, Method, Times

from .console import console, make_table
from .fit import HELD, least_squares
from .prefill_points import Point, read
from .prefill_sweep import DTYPE, PAGE_SIZE

# Where one way takes long, by this factor more than the other, its prediction decides nothing:
# there an error counts less. So does one of the host's time where the GPU takes so much longer.
FAR, FAR_WEIGHT, HIDDEN_WEIGHT = 2.0, 0.5, 0.1
_SHOWN = 5
_FITTED = [name for name in PrefillCosts._fields if name != "planning_us"]


class Sample(NamedTuple):
    """A point of a sweep, and what predicts it."""

    point: Point
    work: dict[Method, AbsorbedWork | ExpandedWork]

    def predicted(self, method: Method, costs: PrefillCosts) -> Times:
        work = self.work[method]
        return Times(work.us(costs), work.host_us(costs))

    def chosen(self, costs: PrefillCosts, captured: bool) -> Method:
        return min(METHODS, key=lambda method: self.predicted(method, costs).us(captured))

    def regret(self, costs: PrefillCosts, captured: bool) -> float:
        """Time of the way chosen over that of the better one: 1 at best."""
        took = {method: self.point.took(method, captured) for method in METHODS}
        return took[self.chosen(costs, captured)] / min(took.values())


def run(args: Namespace, device: Device) -> int:
    points = [point for path in args.runs for point in read(path)]
    samples = [sample(point, device) for point in points]
    costs = fit(samples, device)
    _print(device, costs, samples)
    if args.out:
        made = {
            "date": date.today().isoformat(),
            "runs": [path.name for path in args.runs],
            "points": len(samples),
            "rms": {name: round(rms, 4) for name, rms in _errors(samples, costs).items()},
        }
        text = prefill_costs.dump(device.name, device.sm_count, costs, made)
        tuned.save(args.out, text)
        console.print(f"wrote {args.out}")
    return 0


def sample(point: Point, device: Device) -> Sample:
    request = Request(
        point.dims, DTYPE, 1, point.new, point.new + point.cached, PAGE_SIZE, True, WORKSPACE_BYTES
    )
    absorbed = absorbed_work(request, device)
    assert absorbed is not None
    expanded = expanded_work(request, device.sm_count, fused.CUDNN in point.attention)
    return Sample(point, {"absorbed": absorbed, "expanded": expanded})


def guessed(device: Device) -> PrefillCosts:
    """Launches as long as anywhere, and shares of the published figures. What a sweep does not tell
    apart is held to them."""
    return PrefillCosts(
        absorbed_us=25,
        decode_factor=1,
        expanded_us=5,
        chunk_us=10,
        attention_us=15,
        product_tflops=0.65 * device.tflops,
        memory_gbs=0.7 * device.bandwidth,
        cudnn_tflops=0.6 * device.tflops,
        flash_tflops=0.25 * device.tflops,
        absorbed_host_us=100,
        expanded_host_us=50,
        chunk_host_us=50,
        attention_host_us=50,
        planning_us=400,
    )


def fit(samples: Sequence[Sample], device: Device) -> PrefillCosts:
    """Least squares of the logarithms of predicted over measured times, from a guess that it is
    held to lightly. planning_us is the median of what was measured."""
    prior = guessed(device)
    origin = torch.tensor([getattr(prior, name) for name in _FITTED], dtype=torch.float64).log()

    def constants(x: Tensor) -> PrefillCosts:
        return prior._replace(**dict(zip(_FITTED, x.exp().tolist(), strict=True)))

    def residuals(x: Tensor) -> Tensor:
        costs = constants(x)
        errors = []
        for s in samples:
            for m in METHODS:
                pairs = zip(_logs(s, m, costs), _weights(s, m), strict=True)
                errors += [error * weight for error, weight in pairs]
        return torch.cat([torch.tensor(errors, dtype=x.dtype), math.sqrt(HELD) * (x - origin)])

    planning_us = median(s.point.plan_us["expanded"] for s in samples)
    fitted = constants(least_squares(residuals, origin))._replace(planning_us=planning_us)
    return balanced(fitted, samples)


def balanced(costs: PrefillCosts, samples: Sequence[Sample]) -> PrefillCosts:
    """With the absorbed way's share of `decode` changed by up to 2 %, less than its error, so that
    the choice costs least: least squares do not see which of two times is the shorter."""
    tried = [
        costs._replace(decode_factor=costs.decode_factor * (1 + 0.005 * i))
        for i in (0, -1, 1, -2, 2, -3, 3, -4, 4)
    ]
    return min(
        tried,
        key=lambda of: sum(
            math.log(s.regret(of, captured)) for s in samples for captured in (False, True)
        ),
    )


def _logs(sample: Sample, method: Method, costs: PrefillCosts) -> Times:
    """Of predicted over measured times."""
    p, times = sample.point, sample.predicted(method, costs)
    return Times(math.log(times.gpu / p.us[method]), math.log(times.host / p.host_us[method]))


def _weights(sample: Sample, method: Method) -> tuple[float, float]:
    """Of the errors of both times."""
    us, host_us = sample.point.us, sample.point.host_us
    return (
        FAR_WEIGHT if us[method] > FAR * min(us.values()) else 1.0,
        HIDDEN_WEIGHT if us[method] > FAR * host_us[method] else 1.0,
    )


def _errors(samples: Sequence[Sample], costs: PrefillCosts) -> dict[str, float]:
    """Root mean squares of the logarithms: about the relative errors."""
    found = {}
    for m in METHODS:
        logs = [_logs(s, m, costs) for s in samples]
        for name, errors in zip((m, f"{m}, host"), zip(*logs, strict=True), strict=True):
            found[name] = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return found


def _print(device: Device, costs: PrefillCosts, samples: Sequence[Sample]) -> None:
    table = make_table(f"constants of prefill, {device.name}", "", "", numbers=1)
    for name, value in costs._asdict().items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    for name, rms in _errors(samples, costs).items():
        table.add_row(f"root mean square error, {name}", f"{rms:.4f}")
    console.print(table)
    for captured, where in ((True, "in a CUDA graph"), (False, "without one")):
        _print_regret(costs, samples, captured, where)


def _print_regret(
    costs: PrefillCosts, samples: Sequence[Sample], captured: bool, where: str
) -> None:
    found = sorted(((s.regret(costs, captured), s) for s in samples), key=lambda each: -each[0])
    mean = math.exp(sum(math.log(regret) for regret, _ in found) / len(found))
    console.print(
        f"{where} the choice costs {mean - 1:.2%} in the geometric mean of {len(found)} points, "
        f"{found[0][0] - 1:.2%} at worst",
        style="bold",
    )
    for regret, s in found[:_SHOWN]:
        p = s.point
        if regret > 1:
            console.print(
                f"  {regret - 1:.2%} at {p.heads} heads, {p.new} new, {p.cached} cached: "
                f"{s.chosen(costs, captured)}"
            )
