"""What test_sanitizer.py runs under compute-sanitizer: small problems on every row of one d_qk.

Each row x {split, unsplit} x page 1 and 64 x causal x ragged, both dtypes in turn, then values that
a kernel must clamp. Tensors are made on the CPU and copied, and results are compared there, as only
our kernels are instrumented and others' writes go unnoticed. Prints the number of decode launches.

    python sanitizer_target.py D_QK [--fault memcheck|initcheck]

With `--fault` there is one launch, and it does what that tool must find.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # cases, compare

import mla
import torch
from cases import Case, Inputs, make_problem
from compare import check, reference
from mla import _mla
from mla.device import resolve
from mla.variants import Variant

# Lengths that fill whole groups of the schedule, so that no item is split, and lengths that do not.
UNSPLIT, SPLIT = (120, 128, 125), (300, 0, 70)
Q_LENS = {False: 2, True: (3, 0, 2)}  # by raggedness
H_Q = 20  # 40 rows a request: up to three row blocks, the last one not full
DEVICE = "cuda"


def cases(row: Variant) -> list[Case]:
    found = []
    choices = itertools.product((UNSPLIT, SPLIT), (1, 64), (False, True), (False, True))
    for i, (seq_lens, page_size, causal, ragged) in enumerate(choices):
        found.append(
            Case(
                seq_lens,
                q_lens=Q_LENS[ragged],
                h_q=H_Q,
                d_qk=row.d_qk,
                dtype=row.dtypes[i.bit_count() % len(row.dtypes)],
                page_size=page_size,
                causal=causal,
                split_q=ragged,
                split_cache=causal,
            )
        )
    return found


def is_split(case: Case, row: Variant) -> bool:
    cu_seqlens_q = [0, *itertools.accumulate(case.query_lens)]
    made = _mla.schedule(
        list(case.seq_lens),
        cu_seqlens_q if case.ragged else None,
        0 if case.ragged else case.query_lens[0],
        sum(case.query_lens),
        case.h_q,
        1000,
        row.block_rows,
        row.block_n,
        torch.cuda.get_device_properties().multi_processor_count,
    )
    return bool(made["splits"])


def decode(inputs: Inputs, row: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = mla.decode(**inputs.kwargs(), return_lse=True, variant=row.name)
    return out.cpu(), lse.cpu()


def run_case(case: Case, row: Variant) -> None:
    assert is_split(case, row) == (case.seq_lens == SPLIT), f"{case}: wrong lengths for {row.name}"
    inputs = make_problem(case, "cpu")
    check(decode(inputs.to(DEVICE), row), reference(inputs))


def run_untrusted_values(row: Variant) -> int:
    """Lengths, page ids and query offsets out of range: the sanitizer sees where they lead."""
    inputs = make_problem(Case(SPLIT, q_lens=Q_LENS[True], h_q=H_Q, d_qk=row.d_qk), "cpu")
    assert inputs.cu_seqlens_q is not None
    wrong = {
        "seq_lens": torch.tensor([2**31 - 1, -7, 100_000], dtype=torch.int32),
        "block_table": inputs.block_table.clone().fill_(2147480000),
        "cu_seqlens_q": torch.tensor([-5, 3, 2, 1000], dtype=torch.int32),
    }
    for name, tensor in wrong.items():
        decode(replace(inputs, **{name: tensor}).to(DEVICE), row)
    return len(wrong)


def run_fault(tool: str, row: Variant) -> None:
    inputs = make_problem(Case((100,), d_qk=row.d_qk), "cpu").to(DEVICE)
    if tool == "initcheck":
        assert isinstance(inputs.q, torch.Tensor)
        inputs.q = torch.empty_like(inputs.q)
    else:
        launch = _mla.launch_decode

        def misdirected(name: str, dtype: str, params: _mla.DecodeParams, *rest: int) -> None:
            params.lse = 4096  # nobody's memory
            launch(name, dtype, params, *rest)

        _mla.launch_decode = misdirected
    decode(inputs, row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("d_qk", type=int)
    parser.add_argument("--fault", choices=["memcheck", "initcheck"])
    arguments = parser.parse_args()
    rows = [row for row in mla.variants() if row.d_qk == arguments.d_qk]
    rows = [row for row in rows if not row.unsupported_device(resolve(DEVICE))]
    if arguments.fault:
        run_fault(arguments.fault, rows[0])
        return
    launches = 0
    for row in rows:
        for case in cases(row):
            run_case(case, row)
            launches += 1
        launches += run_untrusted_values(row)
    print(f"decode launches: {launches}")


if __name__ == "__main__":
    main()
