"""A DeepSeek-V3 model of transformers on a GPU talks as before once its attention is mla's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", "5.0", reason="needs transformers")

import generating

pytestmark = pytest.mark.skipif(
    not generating.SCRIPT.exists(), reason="these tests were copied out of the repository"
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", generating.CONVERSATIONS)
def test_conversations(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Prompts of several lengths, continued. Without experts: rounding may choose others."""
    turns = generating.CONVERSATIONS[name]
    theirs, ours = generating.both(turns, dtype, device, dense_layers=4)
    generating.check_nearly(theirs, ours, dtype)
