"""What `mla demo` reads of the text that comes with mla."""

from __future__ import annotations

from mla import data

from .arguments import UsageError

# Where each request's prompt begins in the text, and how many bytes it has: a ragged batch in which
# one request starts with nothing but the begin token.
PROMPTS = (
    ("A language model writes", 0),
    ("Carrying is the whole", 61),
    ("There is one obstacle", 180),
    ("Multi-head latent", 400),
)


def excerpts(steps: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of the `steps` bytes that follow each in the text."""
    prompts, continuations = [], []
    for beginning, size in PROMPTS:
        text = data.text().encode("utf-8")
        start = text.index(beginning.encode("utf-8"))
        following = text[start + size : start + size + steps]
        if len(following) < steps:
            raise UsageError(f"--steps {steps}: the text ends after {len(following)} more tokens")
        prompts.append([data.BOS, *text[start : start + size]])
        continuations.append(list(following))
    return prompts, continuations
