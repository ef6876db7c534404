"""What test_determinism.py runs several of side by side: one batch over and over.

    python rerunning.py VARIANT

Prints how many reruns there were, and in how many of them how many outputs had other bits than in
the first.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # cases, running

import mla
import torch
from cases import Case, make_problem
from running import clone, run

SECONDS = 10.0
PAUSE = 64  # reruns from one look at the results to the next
LENGTHS = (4000, 1, 0, 1024, 1025, 130, 9000, 64, 65, 2500, 700)


def main(name: str) -> None:
    (row,) = (row for row in mla.variants() if row.name == name)
    lengths = tuple(random.Random(0).choices(LENGTHS, k=300))
    inputs = make_problem(Case(lengths, d_qk=row.d_qk or 576), "cuda")
    first, _ = clone(run(inputs, variant=name, batch_invariant=True))
    integers = first.view(torch.int16)
    options = {"scale": inputs.case.scale, "variant": name, "batch_invariant": True}
    arguments = inputs.kwargs() | options | {"out": torch.empty_like(first)}
    reruns, found = 0, []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        differ = []
        for _ in range(PAUSE):
            out = mla.decode(**arguments)
            differ.append((out.view(torch.int16) != integers).sum())
        reruns += PAUSE
        found += [count for count in torch.stack(differ).tolist() if count]
    print(f"{name}: {reruns} reruns, {len(found)} with other bits: {found[:10]}")
    sys.exit(1 if found else 0)


main(*sys.argv[1:])
