"""What options of commands are made of. Needs the standard library only."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def lengths(text: str) -> list[int]:
    """'4096' or '17,0,4096'."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(
            f"expected a length or a list like 17,0,4096, got {text!r}"
        ) from None
    if min(found) < 0:
        raise ArgumentTypeError(f"lengths must not be negative, got {text}")
    return found


def dims(text: str) -> tuple[int, int]:
    """'576/512' -> (576, 512)."""
    try:
        d_qk, d_v = (int(part) for part in text.split("/"))
    except ValueError:
        raise ArgumentTypeError(f"expected d_qk/d_v like 576/512, got {text!r}") from None
    return d_qk, d_v


_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}


def dtype_name(text: str) -> str:
    if text not in _DTYPES:
        raise ArgumentTypeError(f"expected one of {', '.join(_DTYPES)}, got {text!r}")
    return _DTYPES[text]
