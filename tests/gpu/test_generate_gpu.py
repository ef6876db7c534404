"""A small DeepSeek-V3 of transformers talks on a GPU as it did before its attention was ours."""

from __future__ import annotations

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


# Of the logits' standard deviation: what rounding moves one by, where it sends a token to other
# experts as well.
@pytest.mark.parametrize(
    ("dtype", "within"),
    [(torch.bfloat16, 0.15), (torch.float16, 0.008)],
    ids=["bfloat16", "float16"],
)
@pytest.mark.parametrize("lengths", [(23, 1, 9), (700, 40), (5, 300, 2)], ids=str)
def test_the_same_greedy_tokens(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    within: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Turn by turn, so that prompts are appended to what the cache has, many tokens and few."""
    ways = count_ways(monkeypatch)
    stock, ours = both_models(load_example(), dtype, device, 800)
    turns = read_text(lengths)
    want = talk(stock, turns, new_tokens=8)
    got = talk(ours, turns, new_tokens=8)
    assert len(ways) == stock.config.num_hidden_layers * 8 * len(turns)
    assert "decode" in ways
    assert_same_tokens(got, want, stock, within)
