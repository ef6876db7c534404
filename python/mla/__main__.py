"""`python -m mla` is the command `mla`."""

import sys

from .cli import main

sys.exit(main())
