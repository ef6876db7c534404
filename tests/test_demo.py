"""`mla demo` passes, and notices mistakes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mla
import pytest
import torch
from command_line import Output, command
from mla import data, reference
from mla.cli import demo
from mla.demo_layer import DemoLayer, ExpandedReference, deepseek_v3

SMALL_LAYER = functools.partial(deepseek_v3, hidden=128, heads=8, q_lora=64)


def test_demo_with_the_real_sizes(capsys: Output) -> None:
    assert command("demo --device cpu --steps 2") == 0
    printed = capsys.readouterr().out
    assert "all 2 steps agree with the un-absorbed float64 reference" in printed
    assert "variant cpu" in printed
    assert "0.135234" in printed


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_demo_small(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "deepseek_v3", SMALL_LAYER)
    line = f"demo --device cpu --steps 6 --page-size 1 --seed 3 --dtype {dtype}"
    assert command(line) == 0


def wrong_scale(inputs: dict[str, Any]) -> None:
    inputs["scale"] = 192**-0.5


def newest_token_missed(inputs: dict[str, Any]) -> None:
    inputs["seq_lens"] = inputs["seq_lens"] - 1


def neighbours_pages(inputs: dict[str, Any]) -> None:
    inputs["block_table"] = inputs["block_table"].flip(0)


@pytest.mark.parametrize("mistake", [wrong_scale, newest_token_missed, neighbours_pages])
def test_demo_notices(
    mistake: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    decode = mla.decode

    def mistaken(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, **options: Any) -> Any:
        inputs = {"block_table": block_table, "seq_lens": seq_lens, **options}
        mistake(inputs)
        return decode(q, kv_cache, **inputs)

    monkeypatch.setattr(mla, "decode", mistaken)
    monkeypatch.setattr(demo, "deepseek_v3", SMALL_LAYER)
    assert command("demo --device cpu --steps 3") == 1
    assert "steps are wrong" in capsys.readouterr().out


def test_expanded_reference_agrees_with_the_one_step_reference() -> None:
    config = SMALL_LAYER()
    layer = DemoLayer(
        config,
        vocabulary=data.VOCABULARY,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        seed=1,
    )
    positions = torch.arange(9, dtype=torch.int32)
    hidden = layer.embed(torch.tensor(data.encode("absorbed")))
    rows = layer.cache_rows(*layer.latents(hidden), positions)
    q_nope, q_rope = layer.queries(hidden, positions)
    expanded = ExpandedReference(layer, [9])
    expanded.append(0, rows[:4])
    expanded.append(0, rows[4:])
    latent, rope = rows[:, : config.kv_lora], rows[:, config.kv_lora :]
    want, _ = reference.attend_expanded(
        q_nope[-1:], q_rope[-1:], latent, rope, *layer.factors(), scale=config.softmax_scale
    )
    torch.testing.assert_close(expanded.attend(0, q_nope[-1], q_rope[-1]), want[0])


def test_text_and_tokens() -> None:
    text = data.text()
    assert 4000 < len(text) < 20000
    tokens = data.encode(text)
    assert tokens[0] == data.BOS
    assert max(tokens[1:]) < 256
    assert data.decode(tokens) == text
