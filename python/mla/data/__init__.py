"""The text that `mla demo` reads, and its tokenisation: a begin token, then the UTF-8 bytes."""

from importlib.resources import files

BOS = 256  # begins every sequence; 0..255 are the bytes
VOCABULARY = 257


def text() -> str:
    """An English text of about 6 KB, written for this package."""
    return files(__name__).joinpath("attention_caches.txt").read_text(encoding="utf-8")


def encode(string: str) -> list[int]:
    """The token ids of a string: BOS, then its UTF-8 bytes."""
    return [BOS, *string.encode("utf-8")]


def decode(tokens: list[int]) -> str:
    """The string of token ids, without BOS; a character cut off at either end is replaced."""
    return bytes(token for token in tokens if token != BOS).decode("utf-8", errors="replace")
