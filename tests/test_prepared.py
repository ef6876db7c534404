"""Prepared calls: the second call of a kind does what the first one did, with its own tensors.

No GPU: launches are recorded. test_prepared_launches.py has the launches themselves.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mla import _mla, first_call
from recipes import CHANGES, RECIPES, Recipe, launched, on_a100, run
from recording import Launch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from wrong_calls import WRONG, Arguments, pairs, ragged, uniform
from wrong_calls import given as changed


@pytest.fixture(scope="module")
def seen() -> Iterator[list[Launch]]:
    """As `launches`, for all examples of a property."""
    with on_a100() as launches:
        yield launches


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=RECIPES, changes=st.lists(CHANGES, min_size=1, max_size=3), warm=st.booleans())
def test_prepared_calls_launch_what_first_calls_do(
    recipe: Recipe, changes: list[tuple[str, Any]], warm: bool, seen: list[Launch]
) -> None:
    """Calls that differ in a few things, in one table and each in an empty one."""
    recipes = [recipe]
    for name, value in changes:
        recipes.append(replace(recipes[-1], **{name: value}))
    _mla.forget()
    if warm:  # other tensors have prepared the calls
        for each in recipes:
            run(each.call(), each.context)
    calls = [(each.call(), each.context) for each in recipes]
    prepared = [launched(seen, *call) for call in [*calls, *calls]]
    for i, call in enumerate(calls):
        _mla.forget()
        first = launched(seen, *call)
        assert prepared[i] == prepared[len(calls) + i] == first


# ---- What is prepared is used, and only for what it is good for ----


def as_given(**options: Any) -> Arguments:
    """A right call with outputs of the caller's."""
    return Recipe(b=3, s_q=2, h_q=8, **options).call()


RIGHT = [
    lambda: changed(uniform),
    lambda: changed(uniform, return_lse=True),
    lambda: changed(ragged),
    lambda: changed(pairs),
    lambda: changed(uniform, d_v=512),
    lambda: as_given(pages=10, max_pages=4),
    lambda: as_given(pages=10, max_pages=4, lse=False),
    lambda: as_given(pages=10, max_pages=4, out=False),
    lambda: as_given(pages=10, max_pages=4, workspace=True),
    lambda: as_given(pages=10, max_pages=4, out=False, lse=False, workspace=True),
    lambda: as_given(pages=10, max_pages=4, plan="free"),
]


@pytest.mark.parametrize("what", WRONG)
def test_wrong_calls_are_refused_after_right_ones(what: str, launches: list[Launch]) -> None:
    for right in RIGHT:
        mla.decode(**right())
    launches.clear()
    make, error, message = WRONG[what]
    if message.startswith("workspace: "):  # which on a GPU is too small as well
        message = "workspace: "
    with pytest.raises(error, match=r"^" + re.escape(message)):
        mla.decode(**make())
    assert launches == []


def test_the_second_call_is_prepared(launches: list[Launch], firsts: list[str]) -> None:
    for right in RIGHT:
        _mla.forget()
        firsts.clear()
        for _ in range(3):
            mla.decode(**right())
        assert firsts == ["first"]
        assert _mla.num_prepared() == 1


def test_what_was_dropped_is_looked_at_anew(launches: list[Launch], firsts: list[str]) -> None:
    """Though it was the call that was found last."""
    for _ in range(2):
        _mla.forget()
        for _ in range(3):
            mla.decode(**as_given())
    assert firsts == ["first"] * 2


@pytest.mark.parametrize("recipe", [Recipe(b=3, s_q=2, h_q=8), Recipe(ragged=True, padded=True)])
def test_outputs_are_made_each_time(recipe: Recipe, launches: list[Launch]) -> None:
    call = replace(recipe, out=False, lse=False).call()
    shape = call["q"].shape[:-1]
    kept = []
    for _ in range(2):
        out, lse = mla.decode(**call)
        assert (out.shape, out.dtype, out.is_contiguous()) == ((*shape, 512), torch.bfloat16, True)
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == (shape, torch.float32, True)
        p = launches[-1].params
        assert (p["out"], p["lse"]) == (out.data_ptr(), lse.data_ptr())
        assert (0, *out.stride())[-4:-1] == (p["out_batch"], p["out_token"], p["out_head"])
        assert (0, *lse.stride())[-3:] == (p["lse_batch"], p["lse_token"], p["lse_head"])
        kept += [out, lse]
    assert len({t.data_ptr() for t in kept}) == 4


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, torch.tensor(0.1), "0.1", None])
def test_scale_is_checked_each_time(scale: Any, launches: list[Launch]) -> None:
    mla.decode(**uniform())
    launches.clear()
    with pytest.raises((TypeError, ValueError), match=r"^scale: got"):
        mla.decode(**uniform() | {"scale": scale})
    assert launches == []


def test_what_nobody_prepares_is_still_right(launches: list[Launch]) -> None:
    """Truth values, numbers and tensors of other types, as they were accepted at first."""

    class Mine(Tensor):
        pass

    call = as_given()
    mla.decode(**call)
    want = launches[-1].params
    for change in (
        {"causal": 1},
        {"return_lse": 1},
        {"batch_invariant": 0},
        {"scale": torch.tensor(0.1, dtype=torch.float64).numpy()[()]},
        {"q": call["q"].as_subclass(Mine)},
        {"q": torch.nn.Parameter(call["q"], requires_grad=False)},
        {"seq_lens": call["seq_lens"].as_subclass(Mine)},
        {"d_v": torch.tensor(512).numpy()[()]},
    ):
        for _ in range(2):
            mla.decode(**call | change)
            assert launches[-1].params == want


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory_are_refused(launches: list[Launch]) -> None:
    """As tracing has them: a launch would be given null pointers."""
    right = as_given(out=False)
    mla.decode(**right)
    launches.clear()
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if type(v) is Tensor else v for n, v in right.items()}
        with pytest.raises(ValueError, match=r"expected one with memory$"):
            mla.decode(**fake)
        assert launches == []
        out, _ = mla.decode(**right)
    assert type(out) is Tensor  # outputs of tensors with memory have memory
    assert launches


def test_gradients_are_refused_each_time(launches: list[Launch]) -> None:
    for name in ("q", "kv_cache", "out", "lse"):
        call = as_given()
        mla.decode(**call)
        launches.clear()
        call[name].requires_grad_()
        with pytest.raises(ValueError, match=f"^{name}: requires grad"):
            mla.decode(**call)
        assert launches == []
        with torch.no_grad():
            mla.decode(**call)
        assert launches


@pytest.mark.parametrize("name", ["out", "lse", "workspace"])
def test_overlaps_are_refused_each_time(name: str, launches: list[Launch]) -> None:
    """The layouts are those of the right call: the addresses alone are wrong."""
    call = as_given(workspace=True)
    mla.decode(**call)
    launches.clear()
    for other in ("q", "kv_cache", "block_table", "seq_lens", "out", "lse", "workspace"):
        if other == name:
            continue
        wrong = dict(call)
        nbytes = max(t.numel() * t.element_size() for t in (call[name], call[other]))
        memory = torch.empty(nbytes, dtype=torch.uint8)
        for each in (name, other):
            size = call[each].numel() * call[each].element_size()
            wrong[each] = memory[-size:].view(call[each].dtype).view(call[each].shape)
        with pytest.raises(ValueError, match=r": overlaps \w+ in memory"):
            mla.decode(**wrong)
    assert launches == []


def test_slices_of_one_buffer_are_told_apart(launches: list[Launch], firsts: list[str]) -> None:
    """q and out lie in one another's range; prepared is what lies as it did."""

    def call(gap: int) -> Arguments:
        buffer = torch.empty(3, 2, 8, 1200, dtype=torch.bfloat16)
        return uniform() | {"q": buffer[..., :576], "out": buffer[..., 576 + gap :][..., :512]}

    for _ in range(2):
        mla.decode(**call(0))
    assert firsts == ["first"]
    mla.decode(**call(8))
    assert firsts == ["first"] * 2
    with pytest.raises(ValueError, match=r"^out: overlaps q in memory"):
        mla.decode(**call(-8))


def test_rows_are_aligned_each_time(launches: list[Launch]) -> None:
    right = as_given(split_q=True, split_cache=True, workspace=True)
    mla.decode(**right)
    launches.clear()

    def moved(tensor: Tensor) -> Tensor:
        flat = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
        start = next(i for i in range(1, 8) if flat[i:].data_ptr() % 16)
        return flat[start:][: tensor.numel()].view(tensor.shape)

    for name in ("q", "kv_cache"):
        first, second = right[name]
        for wrong in ((moved(first), second), (first, moved(second))):
            with pytest.raises(ValueError, match=r"data at byte \d+ of 16"):
                mla.decode(**right | {name: wrong})
    for name in ("out", "workspace"):
        with pytest.raises(ValueError, match=rf"^{name}: got data at byte \d+ of 16"):
            mla.decode(**right | {name: moved(right[name])})
    assert launches == []


# ---- Settings ----


def test_forcing_comes_before_what_is_prepared(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = uniform()
    names = [v.name for v in mla.variants() if v.d_qk == 576 and v.pipeline == "sm80"][:3]
    for _ in range(2):
        mla.decode(**call)
        free = launches[-1].variant
        monkeypatch.setenv("MLA_VARIANT", names[0])
        mla.decode(**call)
        assert launches[-1].variant == names[0]
        with mla.use_variant(names[1]):
            mla.decode(**call)
            assert launches[-1].variant == names[1]
            mla.decode(**call, variant=names[2])
            assert launches[-1].variant == names[2]
            mla.decode(**call, variant="")
            assert launches[-1].variant == names[1]
        monkeypatch.delenv("MLA_VARIANT")
        mla.decode(**call)
        assert launches[-1].variant == free
    monkeypatch.setenv("MLA_VARIANT", "sm75")
    with pytest.raises(ValueError, match=r"^variant: got 'sm75'"):
        mla.decode(**call)
    monkeypatch.setenv("MLA_VARIANT", "sm90_3wg")
    with pytest.raises(mla.UnsupportedError):
        mla.decode(**call)


def test_values_are_checked_when_asked_for(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = uniform() | {"seq_lens": torch.tensor([-1, 0, 0], dtype=torch.int32)}
    mla.decode(**bad)
    monkeypatch.setenv("MLA_VALIDATE", "1")
    monkeypatch.setattr(first_call.launch, "capturing", lambda device: False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^seq_lens\[0\]: got -1"):
            mla.decode(**bad)
    monkeypatch.setenv("MLA_VALIDATE", "0")
    mla.decode(**bad)


def test_the_log_is_told_of_prepared_calls(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mla.decode(**uniform())
    monkeypatch.setenv("MLA_LOG", "dispatch")
    with caplog.at_level(logging.INFO, "mla"):
        for _ in range(3):
            mla.decode(**uniform())
    assert len(caplog.records) == 1


# ---- Plans ----


def test_plans_of_equal_sizes_share_a_call(launches: list[Launch], firsts: list[str]) -> None:
    calls = [as_given(plan="free") for _ in range(3)]
    for call in calls:
        mla.decode(**call)
        assert launches[-1].params["plan"] == call["plan"].schedule.data_ptr()
    assert firsts == ["first"]
    other = Recipe(b=4, s_q=2, h_q=8, plan="free").call()["plan"]
    with pytest.raises(ValueError, match=r"^plan: got a plan for b = 4"):
        mla.decode(**calls[0] | {"plan": other})
    for mode, other_mode in ((False, True), (True, False)):
        call, other = (as_given(plan="free", batch_invariant=m) for m in (mode, other_mode))
        mla.decode(**call)
        with pytest.raises(
            ValueError, match=f"^plan: got a plan for batch_invariant = {other_mode}"
        ):
            mla.decode(**call | {"plan": other["plan"]})
    with pytest.raises(TypeError, match=r"^plan: got str"):
        mla.decode(**calls[0] | {"plan": "mine"})


def test_updates_are_checked_each_time(launches: list[Launch]) -> None:
    plan = as_given(plan="free")["plan"]
    lens = [torch.zeros(3, dtype=torch.int32) for _ in range(3)]
    for each in lens:
        plan.update(each)
        assert launches[-1].params["seq_lens"] == each.data_ptr()
    launches.clear()
    for wrong, error in (
        (torch.zeros(3, dtype=torch.int64), TypeError),
        (torch.zeros(4, dtype=torch.int32), ValueError),
        (torch.zeros(6, dtype=torch.int32)[::2], ValueError),
        (torch.zeros(3, 1, dtype=torch.int32), ValueError),
        (torch.zeros(3, dtype=torch.int32, device="meta"), ValueError),
        ([1, 2, 3], TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error, match=r"^seq_lens: got"):
            plan.update(wrong)
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: got"):
        plan.update(lens[0], torch.zeros(4, dtype=torch.int32))
    assert launches == []
    plan.update(lens[0])
    assert len(launches) == 1


# ---- Ways of reading, bounds, threads ----


@pytest.fixture
def by_attributes() -> Iterator[None]:
    """As with a torch that has no exchange API."""
    _mla.use_exchange_api(False)
    yield
    _mla.use_exchange_api(True)


def test_both_ways_of_reading_tensors_agree(
    launches: list[Launch], firsts: list[str], by_attributes: None
) -> None:
    recipes = [Recipe(), Recipe(ragged=True, padded=True), Recipe(split_q=True, plan="free")]
    for recipe in recipes:
        call = recipe.call()
        mla.decode(**call)
        _mla.use_exchange_api(True)
        mla.decode(**call)
        _mla.use_exchange_api(False)
        mla.decode(**call)
        assert launches[-1] == launches[-2 if recipe.plan else -3]
    assert len(firsts) == len(recipes)


def test_wrong_tensors_are_refused_by_attributes_too(
    launches: list[Launch], by_attributes: None
) -> None:
    mla.decode(**uniform())
    for what in ("seq_lens is a list", "q float32", "out is a float"):
        make, error, message = WRONG[what]
        with pytest.raises(error, match=r"^" + re.escape(message)):
            mla.decode(**make())


def test_the_number_of_prepared_calls_is_bounded(launches: list[Launch]) -> None:
    most = 0
    table = torch.empty(2, 9000, dtype=torch.int32)
    call = Recipe().call()
    for columns in range(1, 4200):
        mla.decode(**call | {"block_table": table[:, :columns]})
        launches.clear()
        most = max(most, _mla.num_prepared())
    assert 1000 <= most <= 4096
    assert 0 < _mla.num_prepared() < most


def test_threads_share_what_is_prepared(launches: list[Launch]) -> None:
    """Some call, and allocate; others drop what is prepared and kept."""
    calls = [Recipe(b=b, out=False, lse=False).call() for b in (1, 2, 5)]
    failures: list[BaseException] = []

    def work(forgets: bool) -> None:
        try:
            for i in range(300):
                if forgets:
                    _mla.forget()
                else:
                    mla.decode(**calls[i % 3])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i % 3 == 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
