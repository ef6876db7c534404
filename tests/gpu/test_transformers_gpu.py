"""The module on a GPU against transformers' own attention there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", "5.0", reason="needs transformers")

from test_transformers import MODELS_OF_TRANSFORMERS, Comparison


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", MODELS_OF_TRANSFORMERS)
def test_same_as_their_attention(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Un-absorbed, absorbed, and absorbed with merged weights."""
    comparison = Comparison(name, dtype, device)
    comparison.check(method="expanded")
    comparison.check(method="absorbed")
    comparison.layer.merge_weights()
    comparison.check(method="absorbed")
