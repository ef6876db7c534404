"""Which variant runs a problem: the forced one, else the one predicted to be fastest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from .device import Device
from .errors import UnsupportedError
from .estimate import Estimate, estimate
from .problem import Problem
from .variants import VARIANTS, Variant

_context: ContextVar[str | None] = ContextVar("mla_variant", default=None)


class Forced(NamedTuple):
    """A pipeline's or a variant's name, and who asked for it."""

    name: str
    by: str

    def admits(self, variant: Variant) -> bool:
        return self.name in (variant.name, variant.pipeline)

    def __str__(self) -> str:
        return f"{self.name!r} (forced by {self.by})"


class Choice(NamedTuple):
    """What became of the table: the variant chosen, and what is known of all others."""

    variant: Variant | None
    forced: Forced | None
    estimates: dict[str, Estimate | None]  # of those that can run
    reasons: dict[str, list[str]]  # of those that cannot


def forced(argument: str | None = None) -> Forced | None:
    """The name in force: argument, then `use_variant`, then the environment's MLA_VARIANT."""
    if argument:
        return _known(Forced(argument, "variant="))
    if name := _context.get():
        return Forced(name, "mla.use_variant")
    if name := os.environ.get("MLA_VARIANT"):
        return _known(Forced(name, "MLA_VARIANT"))
    return None


def _known(request: Forced) -> Forced:
    if not any(request.admits(variant) for variant in VARIANTS):
        pipelines = ", ".join(dict.fromkeys(variant.pipeline for variant in VARIANTS))
        raise ValueError(
            f"variant: got {request}, expected a pipeline ({pipelines}) or a name that "
            "mla.variants() lists"
        )
    return request


@contextmanager
def use_variant(name: str) -> Iterator[None]:
    """Forces a pipeline or a variant on the calls in the block, in this thread or task only.

    An argument `variant=` of a call goes first. ValueError for a name that the table lacks.
    """
    _known(Forced(name, "mla.use_variant"))
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def weigh(problem: Problem, device: Device, request: Forced | None) -> Choice:
    """Goes through the whole table.

    What a batch-invariant problem gets does not depend on the batch, though the estimates do.
    """
    ranked = problem.without_batch() if problem.batch_invariant else problem
    estimates: dict[str, Estimate | None] = {}
    reasons: dict[str, list[str]] = {}
    best: Variant | None = None
    best_us = float("inf")
    for variant in VARIANTS:
        why_not = variant.unsupported(problem, device)
        if why_not:
            reasons[variant.name] = why_not
            continue
        predicted = estimates[variant.name] = estimate(variant, problem, device)
        if ranked is not problem:
            predicted = estimate(variant, ranked, device)
        us = 0.0 if predicted is None else predicted.us
        if us < best_us and (request is None or request.admits(variant)):
            best, best_us = variant, us
    return Choice(best, request, estimates, reasons)


def choose(problem: Problem, device: Device, request: Forced | None) -> Variant:
    """The variant to run; UnsupportedError, with all reasons, if none or not the forced one can."""
    choice = weigh(problem, device, request)
    if choice.variant is None:
        raise refusal(problem, device, choice)
    return choice.variant


def refusal(problem: Problem, device: Device, choice: Choice) -> UnsupportedError:
    who = f"variant {choice.forced} cannot run" if choice.forced else "no variant runs"
    reasons = {
        variant.name: choice.reasons.get(variant.name, ["could run, but is not the forced one"])
        for variant in VARIANTS
    }
    return UnsupportedError(f"{who} this problem on {device}: {problem}", reasons)
