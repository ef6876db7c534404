"""The example: a swapped DeepSeek-V3 model of transformers generates what it did before."""

from __future__ import annotations

import sys
from typing import Any

import generating
import pytest
import torch
from generating import CONVERSATIONS, SCRIPT

pytest.importorskip("transformers", "5.0", reason="needs transformers")
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="these tests were copied out of the repository"
)


@pytest.fixture(scope="module")
def example() -> Any:
    return generating.example()


def generate(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return found


@torch.inference_mode()
def test_generates_the_same(example: Any) -> None:
    """In float32 greedy tokens are equal; twice, with other prompts, for what a cache keeps."""
    model = example.small_model(torch.float32, torch.device("cpu"))
    prompts = [
        torch.randint(512, (2, n), generator=torch.Generator().manual_seed(n)) for n in (9, 5)
    ]
    want = [generate(model, prompt) for prompt in prompts]
    logits = model(prompts[0]).logits
    example.swap(model, max_positions=40, page_size=8)
    torch.testing.assert_close(model(prompts[0]).logits, logits, atol=1e-4, rtol=1e-4)
    for prompt, tokens in zip(prompts, want, strict=True):
        assert torch.equal(generate(model, prompt), tokens)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str) -> None:
    """Prompts of several lengths, continued over turns: in float32 the same tokens, of many."""
    theirs, ours = generating.both(CONVERSATIONS[name], torch.float32, torch.device("cpu"), 1)
    assert torch.equal(theirs.tokens, ours.tokens)
    assert len(theirs.tokens.unique()) > 10


def test_a_conversation_in_16_bits() -> None:
    """Absorbed steps by `decode`. Without experts: rounding may choose others."""
    theirs, ours = generating.both(
        CONVERSATIONS["short"], torch.float16, torch.device("cpu"), dense_layers=4
    )
    generating.check_nearly(theirs, ours, torch.float16)


def test_runs(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["swap", "--tokens", "4"])
    example.main()
    printed = capsys.readouterr().out
    error = float(printed.partition("relative RMSE ")[2].split()[0])
    assert 0 < error < 3e-2
    assert printed.strip().endswith("]")
