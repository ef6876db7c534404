"""The example: a swapped DeepSeek-V3 model of transformers generates what it did before."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.0", reason="needs transformers")
SCRIPT = Path(__file__).parents[1] / "examples" / "swap_into_transformers.py"
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="these tests were copied out of the repository"
)


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("swap_into_transformers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_runs(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["swap", "--tokens", "4"])
    example.main()
    printed = capsys.readouterr().out
    error = float(printed.partition("relative RMSE ")[2].split()[0])
    assert 0 < error < 3e-2
    assert printed.strip().endswith("]")
