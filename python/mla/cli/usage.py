"""What every command needs of its options."""

from __future__ import annotations

from argparse import _ActionsContainer


class UsageError(Exception):
    """A command cannot do what its options ask; the text says why and what would work."""


def add_device(parser: _ActionsContainer) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N (default: the current GPU, or cpu without one)"
    )
