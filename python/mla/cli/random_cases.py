"""Cases drawn by a seed: `python -m mla.cli.random_cases --seed 1 --count 200 > FILE.json`.

What models do not ask for today is in them as well: odd head counts, odd pages, many query tokens.
"""

from __future__ import annotations

import json
import random
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import islice
from typing import Any

MAX_KV_BYTES = 48 << 30  # of a case, in 16 bits
MAX_FLOP = 1e13  # of a case: some 50 ms in the slowest variant of an H200
_HEADS = (1, 5, 6, 8, 12, 16, 20, 32, 40, 64, 96, 128)
_PAGES = (1, 2, 4, 8, 16, 32, 64, 128)
_COLUMNS = 576 + 512


def random_cases(
    seed: int, max_kv_bytes: int = MAX_KV_BYTES, max_flop: float = MAX_FLOP
) -> Iterator[dict[str, Any]]:
    """Entries of a file of cases, without end; any first part of them covers the whole space.

    Batch 1 to 300, KV 1 to 200,000 tokens, heads 1 to 128, query tokens 1 to 8, pages of 1 to 128:
    sizes are drawn evenly by their logarithm, and a draw above the limits is drawn again. One case
    in five has ragged lengths.
    """
    dice = random.Random(seed)

    def up_to(most: int) -> int:
        return min(int((most + 1) ** dice.random()), most)

    drawn = 0
    while True:
        b, kv_len = up_to(300), up_to(200_000)
        h_q = dice.choice(_HEADS) if dice.random() < 0.7 else dice.randint(1, 128)
        s_q = 1 if dice.random() < 0.6 else dice.randint(2, 8)
        page_size = dice.choice(_PAGES) if dice.random() < 0.8 else dice.randint(1, 128)
        ragged = b > 1 and dice.random() < 0.2
        lens = [dice.randint(1, kv_len) if ragged else kv_len for _ in range(b)]
        kv_bytes = sum(-(-n // page_size) * page_size for n in lens) * 576 * 2
        if kv_bytes > max_kv_bytes or 2 * s_q * h_q * sum(lens) * _COLUMNS > max_flop:
            continue
        yield {
            "id": f"random/{drawn:03d}_b{b}_q{s_q}_h{h_q}_s{kv_len}_p{page_size}",
            "b": b,
            "s_q": s_q,
            "h_q": h_q,
            "causal": s_q > 1,
            "page_size": page_size,
            "dtype": "bfloat16",
            "seq_lens": lens,
        }
        drawn += 1


def as_file(entries: list[dict[str, Any]]) -> str:
    """One case on each line."""
    lines = (json.dumps(entry, separators=(",", ":")) for entry in entries)
    return "[\n" + ",\n".join(lines) + "\n]"


if __name__ == "__main__":
    parser = ArgumentParser(prog="python -m mla.cli.random_cases", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    print(as_file(list(islice(random_cases(args.seed), args.count))))
