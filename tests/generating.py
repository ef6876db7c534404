"""Conversations: greedy tokens of a causal LM of transformers, over several turns."""

from __future__ import annotations

import importlib.util
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCRIPT = Path(__file__).parents[1] / "examples" / "swap_into_transformers.py"
TEXT = (
    "Latent attention keeps one row for each token, whatever the number of heads. A head's key "
    "and value are products of that row, so that they can be made when they are needed, or never: "
    "the key's matrix can stand in the query instead. Which of both takes less time depends on how "
    "many tokens are new, and on how many were there before. "
)
# Bytes of the text in each turn, of each request: long and short prompts, and single tokens.
CONVERSATIONS = {
    "short": (9, 1, 5),
    "a prompt, then questions": (150, 20, 33, 1),
    "longer each time": (2, 40, 170),
}
NEW = 5  # tokens generated in each turn
B = 2
# Of the logits of two tokens, which are of size 1: rounding may choose the other one.
NEAR = {torch.float16: 0.02, torch.bfloat16: 0.15}


class Conversation(NamedTuple):
    """What each request got, all turns one behind the other."""

    tokens: Tensor  # [b, turns * NEW]
    margins: Tensor  # float32, of the logits, from each token to the next likely


def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("swap_into_transformers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def converse(model: Any, turns: tuple[int, ...]) -> Conversation:
    """Each turn appends its part of the text to what was said, and generates; the cache of the
    turns before is kept."""
    device = next(model.parameters()).device
    kept = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    text = torch.tensor([list(TEXT[i:].encode()[: sum(turns)]) for i in range(B)], device=device)
    said, cache = text[:, :0], None
    tokens, margins = [], []
    for part in text.split(turns, 1):
        said = torch.cat((said, part), 1)
        found = model.generate(
            said,
            attention_mask=torch.ones_like(said),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            **({} if cache is None else {kept: cache}),
        )
        said, cache = found.sequences, found[kept]
        tokens.append(said[:, -NEW:])
        best = torch.stack(found.logits, 1).float().topk(2, -1).values
        margins.append(best[..., 0] - best[..., 1])
    return Conversation(torch.cat(tokens, 1), torch.cat(margins, 1))


@torch.inference_mode()
def both(
    turns: tuple[int, ...], dtype: torch.dtype, device: torch.device, dense_layers: int
) -> tuple[Conversation, Conversation]:
    """By the model with transformers' attention, and with mla's in its place."""
    swapping = example()
    model = swapping.small_model(dtype, device, dense_layers=dense_layers)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than a new model's, for attention to matter
            values = torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
            weight.copy_(values)
    theirs = converse(model, turns)
    positions = sum(turns) + NEW * len(turns)
    swapping.swap(model, max_positions=positions, page_size=16)
    return theirs, converse(model, turns)


def check_nearly(theirs: Conversation, ours: Conversation, dtype: torch.dtype) -> None:
    """Equal until two tokens were nearly as likely: from there on it is another conversation. Most
    tokens come before."""
    compared = 0
    for want, got, margins in zip(theirs.tokens, ours.tokens, theirs.margins, strict=True):
        differ = (want != got).nonzero().flatten().tolist()
        compared += differ[0] if differ else len(want)
        if differ:
            assert float(margins[differ[0]]) < NEAR[dtype]
    assert compared > theirs.tokens.numel() / 4
