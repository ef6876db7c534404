"""The options of `mla bench`, and which go together."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .usage import UsageError, add_device
from .values import dims, dtype_name, positive

OF_GPU_CASES = ("targets", "planning", "graph", "plot", "report")
OF_DECODE = ("variant", "batch_invariant", "dtype", "page_size")
SAY_NOTHING = {
    "host": OF_GPU_CASES,
    **dict.fromkeys(("prefill", "prompt", "append"), OF_GPU_CASES + OF_DECODE),
}


def add_bench_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--cases",
        type=Path,
        default=Path("benchmarks/cases.json"),
        help="list of cases (default: %(default)s)",
    )
    parser.add_argument("--filter", help="only cases whose id contains this")
    parser.add_argument(
        "--variant",
        action="append",
        help="force a pipeline or a variant by name; repeated: measured alternately",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="also measure each variant in the batch-invariant mode, beside the free schedule; "
        "with --host, only in that mode",
    )
    parser.add_argument("--targets", help="choose among the rows of one image set, like ampere_99k")
    parser.add_argument(
        "--planning", action="store_true", help="put the making of the plan inside the clock"
    )
    parser.add_argument("--graph", action="store_true", help="time replays of graphs of the calls")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--host", action="store_true", help="instead of cases: CPU time that a call takes"
    )
    instead.add_argument(
        "--prefill",
        action="store_true",
        help="instead of cases: both ways of prefill over new tokens, cached tokens and heads",
    )
    instead.add_argument(
        "--prompt",
        action="store_true",
        help="instead of cases: tokens/s of a stack of layers, prompts and generation",
    )
    instead.add_argument(
        "--append", action="store_true", help="instead of cases: new rows into the cache"
    )
    parser.add_argument("--repeat", type=positive, help="samples (default: 20, on a CPU 3)")
    parser.add_argument("--dtype", type=dtype_name, help="instead of the cases' own")
    parser.add_argument("--page-size", type=positive, help="instead of the cases' own")
    parser.add_argument("--dims", type=dims, default=(576, 512), help="d_qk/d_v (576/512)")
    parser.add_argument("--json", type=Path, help="write the times here, conditions beside it")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write a page with tables and plots there"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="FILE.json",
        help="times of others for the report: {case id: {name: us}}",
    )
    add_device(parser)


def refuse_what_says_nothing(args: Namespace) -> None:
    """UsageError for options of `mla bench` that the kind of run asked for does not look at."""
    for kind, names in SAY_NOTHING.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        if getattr(args, kind) and given:
            raise UsageError(f"--{kind} does not go with {', '.join(given)}")
