"""The command line `mla`, the same as `python -m mla`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from .arguments import make_parser
from .usage import UsageError

_EXTRAS = ("rich", "matplotlib")  # what the extra `cli` brings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 when what it checked is wrong, 2 when it could not run."""
    args = make_parser().parse_args(argv)
    try:
        return int(import_module(f"mla.cli.{args.command}").run(args))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRAS:
            raise
        message = f"needs {error.name.partition('.')[0]}: pip install 'mla[cli]'"
    except UsageError as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from mla import CudaError, UnsupportedError

        if not isinstance(error, CudaError | UnsupportedError):
            raise
        message = str(error)
    print(f"mla {args.command}: {message}", file=sys.stderr)
    return 2
