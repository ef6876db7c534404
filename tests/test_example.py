"""The example: a swapped DeepSeek-V3 model of transformers generates what it did before."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from generating import (
    EXAMPLE,
    assert_same_tokens,
    both_models,
    count_ways,
    load_example,
    read_text,
    talk,
)

pytestmark = pytest.mark.skipif(
    not EXAMPLE.exists(), reason="these tests were copied out of the repository"
)


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example()


@torch.inference_mode()
def test_the_same_logits(example: Any) -> None:
    stock, ours = both_models(example, torch.float32, torch.device("cpu"), 40)
    (prompt,) = read_text([30])
    want = stock(prompt).logits
    torch.testing.assert_close(ours(prompt).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "way", "within"),
    [
        (torch.float32, "prefill", 0.0),
        (torch.bfloat16, "decode", 0.02),
        (torch.float16, "decode", 0.004),
    ],
    ids=["float32", "bfloat16", "float16"],
)
def test_the_same_greedy_tokens(
    example: Any, dtype: torch.dtype, way: str, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two conversations of several turns, which begin with prompts of other lengths.

    float32, which `decode` does not have, is un-absorbed in every step; other dtypes are absorbed,
    as there are few tokens.
    """
    ways = count_ways(monkeypatch)
    stock, ours = both_models(example, dtype, torch.device("cpu"), 60)
    for lengths in ((23, 1, 9), (5, 12)):
        turns = read_text(lengths)
        want = talk(stock, turns, new_tokens=4)
        assert_same_tokens(talk(ours, turns, new_tokens=4), want, stock, within)
    layers = stock.config.num_hidden_layers
    assert ways == [way] * layers * 4 * 5  # steps of five turns


def test_runs(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["swap", "--tokens", "4"])
    example.main()
    printed = capsys.readouterr().out
    error = float(printed.partition("relative RMSE ")[2].split()[0])
    assert 0 < error < 3e-2
    assert printed.strip().endswith("]")
