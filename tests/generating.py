"""Conversations with a small DeepSeek-V3 of transformers, as it is and with our attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import mla.nn
import pytest
import torch
from mla import data
from their_transformers import transformers
from torch import Tensor

EXAMPLE = Path(__file__).parents[1] / "examples" / "swap_into_transformers.py"
PAGE_SIZE = 8


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both_models(example: Any, dtype: torch.dtype, device: torch.device, most: int) -> list[Any]:
    """The model, and the same with its attention replaced, for up to `most` tokens."""
    models = [example.small_model(dtype, device) for _ in range(2)]
    example.swap(models[1], max_positions=most, page_size=PAGE_SIZE)
    return models


def read_text(lengths: Sequence[int], b: int = 2) -> list[Tensor]:
    """Turns [b, length]: bytes of the text that comes with mla, from other places for each."""
    tokens = torch.tensor(data.encode(data.text())[1:])
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    apart = len(tokens) // b
    return [
        torch.stack([tokens[i * apart + start :][:length] for i in range(b)])
        for start, length in zip(starts, lengths, strict=True)
    ]


def count_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each layer of each step from now on: "decode" absorbed, "prefill" whatever that
    chose."""
    ways: list[str] = []
    for name in ("decode", "prefill"):
        real = getattr(mla.nn, name)

        def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            ways.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(mla.nn, name, counted)
    return ways


@torch.inference_mode()
def talk(model: Any, turns: Sequence[Tensor], new_tokens: int) -> Tensor:
    """All tokens [b, n]: behind each turn come `new_tokens` of the model's own, greedily.

    A turn begins with what the caches have already, so it is an append of several tokens.
    """
    device = model.device
    # Its name since transformers 5.24, and before.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    caches = {name: transformers.DynamicCache(config=model.config)}
    tokens = turns[0][:, :0].to(device)
    for turn in turns:
        tokens = torch.cat((tokens, turn.to(device)), 1)
        tokens = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            **caches,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return tokens


@torch.inference_mode()
def assert_same_tokens(got: Tensor, want: Tensor, model: Any, within: float) -> None:
    """Equal. Or, where a request first differs, a choice between logits that are closer than
    `within` of their standard deviation, by the model that `want` comes from."""
    assert got.shape == want.shape
    for ours, theirs in zip(got, want, strict=True):
        differs = (ours != theirs).nonzero()
        if len(differs):
            first = int(differs[0])
            logits = model(theirs[None, :first]).logits[0, -1].float()
            gap = float((logits[theirs[first]] - logits[ours[first]]) / logits.std())
            assert gap < within, f"token {first}: {gap:.1e} standard deviations apart"
