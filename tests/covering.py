"""Cases in which every pair of values of `AXES` occurs that can occur together: `CASES`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from cases import DEFAULT_SCALE, DIMS, DTYPES, Case

# What varies from case to case. Every pair of values that `possible` allows occurs in CASES.
AXES: dict[str, Sequence[object]] = {
    "d_qk": tuple(DIMS),
    "dtype": tuple(DTYPES),
    "h_q": (1, 3, 5, 6, 12, 16, 20, 40, 63, 64, 96, 126, 128),
    "queries": (1, 2, 3, 4, 5, 6, 7, 8, 33, "ragged", "ragged_long"),
    "page_size": (1, 2, 16, 32, 48, 64, 128, 480),
    "batch": (1, 2, 3, 7, 33, 300),
    "lengths": ("edges", "short", "mixed", "long", "zero"),
    "causal": (True, False),
    "layout": ((False, False), (False, True), (True, False), (True, True)),  # split q, split cache
    "strided": (False, True),
    "return_lse": (False, True),
    "given": (False, True),
    "scale": (DEFAULT_SCALE, -0.7, 0.0, 20.0),  # the last makes peaked probabilities
    "poison": (float("nan"), float("inf")),
}
CASES_PER_DIMS_AND_DTYPE = 24


def possible(choice: dict[str, Any]) -> bool:
    """Whether a case is small enough: its query rows, and the logits of its longest requests."""
    queries = {"ragged": 4, "ragged_long": 12}.get(str(choice["queries"]), choice["queries"])
    batch, heads = choice["batch"], choice["h_q"]
    return batch * queries * heads <= 40_000


def _lengths(kind: object, batch: int, page_size: int, rng: random.Random) -> tuple[int, ...]:
    edges = (page_size + 1, 0, 1, page_size, page_size - 1, 2 * page_size, 3 * page_size + 5)
    if kind == "edges":
        return tuple(edges[i % len(edges)] for i in range(batch))
    if kind == "zero":
        return (0,) * batch
    short = [rng.randint(1, 200) for _ in range(batch)]
    if kind == "mixed":
        short[:: max(batch // 2, 1)] = [
            rng.randint(2000, 3000) for _ in short[:: max(batch // 2, 1)]
        ]
    if kind == "long":
        short[0] = rng.randint(9000, 12000)
    return tuple(short)


def _query_lens(kind: object, batch: int) -> int | tuple[int, ...]:
    cycles = {"ragged": (3, 0, 1, 2, 8, 0, 5), "ragged_long": (1, 40, 0, 9)}
    if isinstance(kind, str):
        return tuple(cycles[kind][i % len(cycles[kind])] for i in range(batch))
    assert isinstance(kind, int)
    return kind


def cover(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Choices of a value on every axis, as many for each (d_qk, dtype).

    Each is the best of many random ones: the one with the most pairs of values not seen before.
    """
    names = list(AXES)
    seen: set[object] = set()

    def pairs(choice: dict[str, Any]) -> set[object]:
        # Indices stand for the values, as nan is not equal to itself.
        indexed = [(name, AXES[name].index(choice[name])) for name in names]
        return set(itertools.combinations(indexed, 2))

    for _ in range(CASES_PER_DIMS_AND_DTYPE):
        for d_qk, dtype in itertools.product(AXES["d_qk"], AXES["dtype"]):
            best: dict[str, Any] = {}
            new: set[object] = set()
            for _ in range(60):
                choice = {name: rng.choice(AXES[name]) for name in names} | {
                    "d_qk": d_qk,
                    "dtype": dtype,
                }
                if possible(choice) and (not best or len(pairs(choice) - seen) > len(new)):
                    best, new = choice, pairs(choice) - seen
            seen |= new
            yield best


def _build_cases() -> tuple[Case, ...]:
    rng = random.Random(0)
    cases = []
    for i, choice in enumerate(cover(rng)):
        batch, page_size = choice["batch"], choice["page_size"]
        layout = choice["layout"]
        plain = {
            k: v for k, v in choice.items() if k not in ("batch", "lengths", "queries", "layout")
        }
        cases.append(
            Case(
                seq_lens=_lengths(choice["lengths"], batch, page_size, rng),
                q_lens=_query_lens(choice["queries"], batch),
                split_q=layout[0],
                split_cache=layout[1],
                label=f"{i}-{choice['lengths']}",
                **plain,
            )
        )
    return tuple(cases)


CASES = _build_cases()
