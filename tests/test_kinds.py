"""Calls of a kind that was seen, with other sizes: prepared without Python, as it would do it.

No GPU: launches are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mla import _mla
from recipes import RECIPES, Recipe, launched, on_a100
from recording import Launch
from torch import Tensor
from wrong_calls import Arguments

SIZES = [
    {"b": 1},
    {"b": 5},
    {"s_q": 3},
    {"pages": 1},
    {"pages": 9},
    {"max_pages": 1},
    {"max_pages": 300},
    {"max_seq_len": 5000},
    {"b": 40, "s_q": 2, "pages": 7, "max_pages": 100},
]
RIGHT = [
    Recipe(),
    Recipe(padded=True),
    Recipe(ragged=True),
    Recipe(split_q=True, split_cache=True, cache_rank=4),
    Recipe(out=False, lse=False),
    Recipe(lse=False, return_lse=False, d_v=True),
    # Of one row, as a plan for other sizes may be for another, which is another kind.
    Recipe(plan="free", context="sm80_r16_n16_s8_d576"),
    Recipe(plan="bounded", ragged=True, max_pages=3, context="sm80_r16_n16_s8_d576"),
    Recipe(workspace=True),
    Recipe(batch_invariant=True),
    Recipe(variant="sm80"),
    Recipe(context="sm80", dtype=torch.float16, d_qk=288),
]
each_kind = pytest.mark.parametrize("recipe", RIGHT, ids=range(len(RIGHT)))


@pytest.fixture(scope="module")
def seen() -> Iterator[list[Launch]]:
    """As `launches`, for all examples of a property."""
    with on_a100() as launches:
        yield launches


@each_kind
def test_other_sizes_come_without_python(
    recipe: Recipe, launches: list[Launch], firsts: list[str]
) -> None:
    launched(launches, recipe.call(), recipe.context)
    for i, sizes in enumerate(SIZES):
        if recipe.plan == "bounded" and sizes.get("max_pages") == 1:
            continue  # leaves the plan no tokens
        other = replace(recipe, **sizes)
        call = other.call()
        firsts.clear()
        known = _mla.num_prepared()
        got = launched(launches, call, other.context)
        assert firsts == [], sizes
        assert _mla.num_prepared() == known + 1
        again = launched(launches, call, other.context)
        _mla.forget()
        assert got == again == launched(launches, call, other.context), i
        assert firsts == ["first"]


def test_the_variant_is_chosen_anew(launches: list[Launch], firsts: list[str]) -> None:
    """Heads and pages stay; what a variant takes depends on the rows and tokens, too."""
    chosen = set()
    for s_q in (1, 2, 3, 5, 8, 20):
        for max_pages in (1, 40, 4000):
            recipe = Recipe(h_q=8, s_q=s_q, max_pages=max_pages)
            mla.decode(**recipe.call())
            chosen.add(launches[-1].variant)
            report = mla.explain(
                h_q=8,
                s_q=s_q,
                b=recipe.b,
                page_size=recipe.page_size,
                kv_len=max_pages * recipe.page_size,
                device="A100",
            )
            assert report.variant is not None
            assert launches[-1].variant == report.variant.name
    assert len(chosen) > 1
    assert firsts == ["first"]


def test_the_variant_is_chosen_by_what_the_caller_says(
    launches: list[Launch], firsts: list[str]
) -> None:
    """Of a block table for the longest context; a length that grows makes few calls anew."""
    recipe = Recipe(b=16, h_q=128, page_size=64, max_pages=2000)
    mla.decode(**recipe.call())
    widest = launches[-1].variant
    chosen = set()
    known = _mla.num_prepared()
    for length in range(1, 3000):
        mla.decode(**replace(recipe, max_seq_len=length).call())
        chosen.add(launches[-1].variant)
        report = mla.explain(h_q=128, b=16, kv_len=2000 * 64, max_seq_len=length, device="A100")
        assert report.variant is not None
        assert launches[-1].variant == report.variant.name
    assert chosen > {widest}
    assert firsts == ["first"]
    assert _mla.num_prepared() - known < 90


def test_with_a_plan_it_decides_nothing(launches: list[Launch], firsts: list[str]) -> None:
    recipe = Recipe(plan="free")
    call = recipe.call()
    mla.decode(**call)
    known = _mla.num_prepared()
    for length in (None, 3, 100_000):
        mla.decode(**call | {"max_seq_len": length})
    assert len({launch.variant for launch in launches if launch.kind == "decode"}) == 1
    assert _mla.num_prepared() == known
    assert firsts == ["first"]


def outcome(seen: list[Launch], call: Arguments, context: str | None) -> Any:
    try:
        return launched(seen, call, context)
    except (TypeError, ValueError, mla.UnsupportedError) as error:
        return type(error), str(error)


def variations(tensor: Tensor) -> Iterator[Tensor]:
    """Others in its place, each different in one thing, in memory of their own."""
    sizes, dtype = tensor.shape, tensor.dtype

    def dense(shape: list[int]) -> list[int]:
        return list(torch.empty(shape, device="meta").stride())

    def made(
        shape: list[int], strides: list[int], start: int = 0, dtype: torch.dtype = dtype
    ) -> Tensor:
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
        return torch.empty(start + reach + 1, dtype=dtype).as_strided(shape, strides, start)

    for dim, size in enumerate(sizes):
        for other in {0, 1, size - 1, size + 1, 17} - {size}:
            shape = [*sizes[:dim], other, *sizes[dim + 1 :]]
            yield made(shape, dense(shape))
        strides = dense([*sizes])
        for other in {0, 1, 2, 8, strides[dim] + 1, strides[dim] + 8, 2 * strides[dim]}:
            yield made([*sizes], [*strides[:dim], other, *strides[dim + 1 :]])
    for shape in ([*sizes[1:]], [*sizes, 1], [1, *sizes], []):
        yield made(shape, dense(shape))
    for start in (1, 8):
        yield made([*sizes], dense([*sizes]), start)
    for other in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8):
        yield made([*sizes], dense([*sizes]), dtype=other)


def slots(call: Arguments) -> list[tuple[str, int | None]]:
    """Names of its tensors, of pairs with the number of the part."""
    found: list[tuple[str, int | None]] = []
    for name, value in call.items():
        if isinstance(value, tuple):
            found += [(name, 0), (name, 1)]
        elif isinstance(value, Tensor):
            found.append((name, None))
    return found


def with_tensor(call: Arguments, slot: tuple[str, int | None], tensor: Tensor) -> Arguments:
    name, part = slot
    if part is None:
        return call | {name: tensor}
    pair = list(call[name])
    pair[part] = tensor
    return call | {name: tuple(pair)}


def tensor_at(call: Arguments, slot: tuple[str, int | None]) -> Tensor:
    name, part = slot
    tensor: Tensor = call[name] if part is None else call[name][part]
    return tensor


def check_as_python(seen: list[Launch], recipe: Recipe, call: Arguments) -> None:
    """What becomes of the call must not depend on the kind's being known."""
    _mla.forget()
    want = outcome(seen, call, recipe.context)
    _mla.forget()
    launched(seen, recipe.call(), recipe.context)
    assert outcome(seen, call, recipe.context) == want


@each_kind
def test_one_thing_is_unusual(recipe: Recipe, seen: list[Launch]) -> None:
    """Sizes that do not agree, elements that overlap, rows that are not aligned, and right ones."""
    call = recipe.call()
    for slot in slots(call):
        for tensor in variations(tensor_at(call, slot)):
            check_as_python(seen, recipe, with_tensor(call, slot, tensor))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=RECIPES, sizes=st.sampled_from([{}, *SIZES]), data=st.data())
def test_several_things_are_unusual(
    recipe: Recipe, sizes: dict[str, int], data: st.DataObject, seen: list[Launch]
) -> None:
    call = replace(recipe, **sizes).call()
    all_slots = st.sampled_from(slots(call))
    for slot in data.draw(st.lists(all_slots, min_size=1, max_size=3, unique=True)):
        tensor = data.draw(st.sampled_from(list(variations(tensor_at(call, slot)))))
        call = with_tensor(call, slot, tensor)
    check_as_python(seen, recipe, call)


def test_overlaps_are_refused(launches: list[Launch]) -> None:
    mla.decode(**Recipe().call())
    call = Recipe(b=3).call()
    memory = torch.empty(1 << 16, dtype=torch.float32)
    for name, tensor in {
        "out": call["q"][..., :512],
        "lse": call["out"].view(torch.float32).flatten()[:9].view(3, 1, 3),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: overlaps"):
            mla.decode(**call | {name: tensor})
    shared = {"seq_lens": memory.view(torch.int32)[:3], "lse": memory[2:11].view(3, 1, 3)}
    with pytest.raises(ValueError, match=r"^lse: overlaps seq_lens"):
        mla.decode(**call | shared)


def test_plans_of_other_sizes_are_refused(launches: list[Launch]) -> None:
    for recipe in (Recipe(plan="free"), Recipe(plan="free", ragged=True)):
        _mla.forget()
        mla.decode(**recipe.call())
        for name, value in {"b": 4, "s_q": 5, "h_q": 7, "page_size": 32}.items():
            other = replace(recipe, **{name: value})
            launches.clear()
            for plan, call in ((recipe, other), (other, recipe)):
                with pytest.raises(ValueError, match=r"^plan: got a plan for"):
                    mla.decode(**call.call() | {"plan": plan.call()["plan"]})
            assert not [launch for launch in launches if launch.kind == "decode"]


def test_a_name_in_force_is_another_kind(launches: list[Launch]) -> None:
    for sizes, name in enumerate((None, "sm80_r64_n32_s3_d576", "sm80_r16_n16_s8_d576"), start=2):
        mla.decode(**Recipe(b=sizes, variant=name).call())
        assert launches[-1].variant == name or name is None
    with pytest.raises(mla.UnsupportedError):
        mla.decode(**Recipe(b=9, variant="sm90_3wg").call())


def test_small_workspaces_are_refused(launches: list[Launch]) -> None:
    mla.decode(**Recipe(workspace=True).call())
    call = Recipe(b=3, workspace=True).call()
    call["workspace"] = call["workspace"][:1000]
    with pytest.raises(ValueError, match=r"^workspace: got 1000 bytes"):
        mla.decode(**call)
