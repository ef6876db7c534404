"""`mla.decode` is a function of C before one of Python: what callers see is that of Python."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import re
from typing import Any

import mla
import pytest
from mla import _mla
from recipes import Recipe
from recording import STREAM, Launch
from wrong_calls import Arguments, uniform

POSITIONAL = ("q", "kv_cache", "block_table", "seq_lens")
DEFAULTS = {"causal": True, "return_lse": False, "batch_invariant": False}
OPTIONAL = (
    *("causal", "cu_seqlens_q", "d_v", "return_lse", "out", "lse", "plan", "workspace"),
    *("batch_invariant", "max_seq_len", "variant"),
)


def call() -> Arguments:
    return Recipe(b=3, s_q=2, h_q=8).call()


def test_its_signature_and_its_documentation_are_those_of_python() -> None:
    parameters = inspect.signature(mla.decode).parameters
    assert list(parameters) == [*POSITIONAL, "scale", *OPTIONAL]
    for name, parameter in parameters.items():
        positional = name in POSITIONAL
        kind = parameter.POSITIONAL_OR_KEYWORD if positional else parameter.KEYWORD_ONLY
        assert parameter.kind == kind
        assert parameter.default == (DEFAULTS.get(name) if name in OPTIONAL else parameter.empty)
    assert (mla.decode.__name__, mla.decode.__module__) == ("decode", "mla.api")
    text = pydoc.render_doc(mla.decode, renderer=pydoc.plaintext)
    assert text.startswith("Python Library Documentation: built-in function decode in module mla.a")
    assert "decode(q, kv_cache, block_table, seq_lens, *, scale, causal=True," in text
    for name in (*POSITIONAL, "scale", *OPTIONAL):
        assert name == "return_lse" or f"\n    {name}: " in text


def test_it_is_pickled_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(mla.decode)) is mla.decode


@pytest.mark.parametrize("num_positional", range(5))
def test_arguments_come_by_place_or_by_name(
    num_positional: int, launches: list[Launch], firsts: list[str]
) -> None:
    given = call()
    mla.decode(**given)
    want = launches[-1].params
    places = [given.pop(name) for name in POSITIONAL[:num_positional]]
    unlike = {"".join(list(name)): value for name, value in given.items()}  # equal, not the same
    for names in (given, unlike, dict(reversed(given.items()))):
        launches.clear()
        mla.decode(*places, **names)
        assert [launch.params for launch in launches if launch.kind == "decode"] == [want]
    assert firsts == ["first"]


def test_what_is_left_out_has_its_default(launches: list[Launch], firsts: list[str]) -> None:
    given = uniform() | {name: DEFAULTS.get(name) for name in OPTIONAL}
    whole = mla.decode(**given)
    for name in OPTIONAL:
        del given[name]
        result = mla.decode(**given)
        assert (result.shape, result.stride()) == (whole.shape, whole.stride())
        assert launches[-1].params["causal"] == 1
    assert firsts == ["first"]


@pytest.mark.parametrize(
    ("places", "names", "message"),
    [
        (0, {}, "missing 4 required positional arguments: 'q', "),
        (3, {"scale": 0.1}, "missing 1 required positional argument: 'seq_lens'"),
        (4, {}, "missing 1 required keyword-only argument: 'scale'"),
        (5, {"scale": 0.1}, "takes 4 positional arguments but 5 "),
        (4, {"scale": 0.1, "sclae": 0.1}, "got an unexpected keyword argument 'sclae'"),
        (1, {"q": 0, "scale": 0.1}, "got multiple values for argument 'q'"),
    ],
)
def test_what_is_no_call_of_it_is_refused_as_python_does(
    places: int, names: dict[str, Any], message: str, launches: list[Launch]
) -> None:
    given = call()
    mla.decode(**given)
    launches.clear()
    values = [given[name] for name in POSITIONAL] + [None]
    with pytest.raises(TypeError, match=rf"^decode\(\) {re.escape(message)}"):
        mla.decode(*values[:places], **names)
    assert launches == []


def test_errors_of_python_pass_through(launches: list[Launch]) -> None:
    given = call()
    mla.decode(**given)

    def broken(*_: object) -> None:
        raise LookupError("of the launch")

    _mla.redirect(broken, broken, lambda device, stream: stream != STREAM)
    with pytest.raises(LookupError, match=r"^of the launch$"):
        mla.decode(**given)
