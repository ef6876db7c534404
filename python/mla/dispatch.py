"""Which variant runs a problem: the forced one, else the one predicted to be fastest."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

from . import _mla, costs
from .device import Device
from .errors import UnsupportedError
from .estimate import Estimate, Model, estimate, model
from .problem import Kind, Problem
from .variants import VARIANTS, Variant

_context: ContextVar[str | None] = ContextVar("mla_variant", default=None)
in_context = _context.get  # the name that `use_variant` set, or None


class Forced(NamedTuple):
    """A pipeline's or a variant's name, and who asked for it."""

    name: str
    by: str

    def admits(self, variant: Variant) -> bool:
        return self.name in (variant.name, variant.pipeline)

    def __str__(self) -> str:
        return f"{self.name!r} (forced by {self.by})"


class Rivals(NamedTuple):
    """What may be chosen for a kind of problem, and who chooses where that is more than one."""

    variants: dict[str, Variant]
    chooser: _mla.Chooser | None


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
    if name := in_context():
        return Forced(name, "mla.use_variant")
    if name := _mla.forced_variant():
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
    ranked = _ranked(problem)
    estimates: dict[str, Estimate | None] = {}
    reasons: dict[str, list[str]] = {}
    best: Variant | None = None
    best_us = float("inf")
    for variant in VARIANTS:
        why_not = variant.unsupported(problem.kind, device)
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
    ranked = _ranked(problem)
    able = _rivals(problem.kind, ranked.kind, device, request)
    if not able.variants:
        raise refusal(problem, device, weigh(problem, device, request))
    if able.chooser is None:
        (only,) = able.variants.values()
        return only
    length = -1 if ranked.max_seq_len is None else ranked.max_seq_len
    sizes = ranked.b, ranked.total_q, ranked.h_q, ranked.max_len, ranked.page_size
    return able.variants[able.chooser.fastest(*sizes, length)]


def chooser(problem: Problem, device: Device, request: Forced | None) -> _mla.Chooser | None:
    """What `choose` goes by where sizes are others; None where it is always the same variant.

    The problem has a variant.
    """
    if problem.batch_invariant:
        return None
    return _rivals(problem.kind, problem.kind, device, request).chooser


def _ranked(problem: Problem) -> Problem:
    """What estimates rank the variants by."""
    return problem.without_batch() if problem.batch_invariant else problem


@lru_cache(maxsize=1024)
def _rivals(kind: Kind, ranked: Kind, device: Device, request: Forced | None) -> Rivals:
    """The variants that may be chosen, without those that another one always beats.

    Of those with equal models the first in the table wins.
    """
    able: dict[Model | None, Variant] = {}
    for variant in VARIANTS:
        if (request is None or request.admits(variant)) and not variant.unsupported(kind, device):
            able.setdefault(model(variant, ranked, device), variant)
    best = {
        variant.name: (variant, found)
        for found, variant in able.items()
        if found is None or not any(other and other.beats(found) for other in able)
    }
    variants = {name: variant for name, (variant, _) in best.items()}
    models = [found for _, found in best.values() if found]
    several = len(variants) > 1
    return Rivals(
        variants, _mla.Chooser(list(variants), models, device.sm_count) if several else None
    )


atexit.register(_rivals.cache_clear)  # the extension's objects end before the extension


def forget() -> None:
    """Constants are read again, and what was concluded from them is dropped: for tests."""
    costs.forget()
    _rivals.cache_clear()


def refusal(problem: Problem, device: Device, choice: Choice) -> UnsupportedError:
    who = f"variant {choice.forced} cannot run" if choice.forced else "no variant runs"
    reasons = {
        variant.name: choice.reasons.get(variant.name, ["could run, but is not the forced one"])
        for variant in VARIANTS
    }
    return UnsupportedError(f"{who} this problem on {device}: {problem}", reasons)
