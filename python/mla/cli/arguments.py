"""The options of every command. Needs the standard library only, so that `--help` always works."""

from __future__ import annotations

from argparse import ArgumentParser, _ActionsContainer
from pathlib import Path

from .values import dims, dtype_name, lengths, positive


class UsageError(Exception):
    """A command cannot do what its options ask; the text says why and what would work."""


def _device(parser: _ActionsContainer) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N (default: the current GPU, or cpu without one)"
    )


def _info(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _explain(parser: ArgumentParser) -> None:
    parser.add_argument("--b", type=positive, help="requests (default: as many as --kv lists)")
    parser.add_argument("--s-q", type=positive, default=1, help="query tokens of each request")
    parser.add_argument("--h", type=positive, default=128, help="query heads")
    parser.add_argument(
        "--kv",
        type=lengths,
        default=[4096],
        metavar="LEN[,LEN..]",
        help="KV tokens of each request; the choice follows the longest",
    )
    parser.add_argument("--d-qk", type=positive, default=576, help="columns of q and KV")
    parser.add_argument("--dtype", type=dtype_name, default="bfloat16", help="bf16 or fp16")
    parser.add_argument("--page-size", type=positive, default=64, help="KV tokens per page")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="of the batch-invariant mode"
    )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        help="of the longest request, where --kv is a block table's width",
    )
    parser.add_argument("--variant", help="force a pipeline or a variant by name")
    parser.add_argument(
        "--prefill",
        action="store_true",
        help="which way the last --s-q of --kv tokens go, with the columns of DeepSeek-V3",
    )
    where = parser.add_mutually_exclusive_group()
    _device(where)
    where.add_argument(
        "--gpu", help="a GPU that need not be here, such as H200, A100 or 'RTX 4090'"
    )


def _check(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--variant", action="append", help="only this pipeline or variant (may be repeated)"
    )
    parser.add_argument("--full", action="store_true", help="more problems, and longer ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    _device(parser)


def _bench(parser: ArgumentParser) -> None:
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
    _device(parser)


def _fit(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", required=True, help="where the runs were recorded, such as H200 or 'RTX 4090'"
    )
    parser.add_argument(
        "--cases",
        type=Path,
        action="append",
        help="list of the cases of the runs (may be repeated; default: benchmarks/cases.json)",
    )
    parser.add_argument("--dims", type=dims, default=(576, 512), help="d_qk/d_v (576/512)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the constants here")
    parser.add_argument(
        "--prefill",
        action="store_true",
        help="the constants of prefill, from what `mla bench --prefill` wrote",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RESULTS.json",
        help="files that `mla bench --json` wrote of forced variants, in turns in one process",
    )


def _tune(parser: ArgumentParser) -> None:
    parser.add_argument("--count", type=positive, default=150, help="cases (default: 150)")
    parser.add_argument("--seed", type=int, default=2, help="of the cases that are drawn")
    parser.add_argument(
        "--time-limit",
        type=positive,
        metavar="SECONDS",
        help="measure no further case after this time",
    )
    parser.add_argument("--repeat", type=positive, help="samples of each (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times here, too")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the constants here instead of where dispatch reads them",
    )
    parser.add_argument("--device", help="cuda or cuda:N (default: the current GPU)")


def _demo(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive, default=32, help="tokens decoded per request")
    parser.add_argument("--page-size", type=positive, default=16, help="KV tokens per page")
    parser.add_argument("--dtype", type=dtype_name, default="bfloat16", help="bf16 or fp16")
    parser.add_argument("--variant", help="force a pipeline or a variant by name")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    _device(parser)


_COMMANDS = {
    "info": (_info, "version, build, driver, devices, and which variants run here"),
    "explain": (_explain, "which variant a problem gets, why, and what each other one lacks"),
    "check": (_check, "self-test: every variant that runs here against a float64 reference"),
    "bench": (_bench, "time decode on a list of cases and hold it against the device's limits"),
    "tune": (_tune, "measure all variants here and fit what dispatch predicts by to this GPU"),
    "fit": (_fit, "the constants that dispatch predicts by, from recorded runs of all variants"),
    "demo": (_demo, "a DeepSeek-V3-shaped attention layer over a real text, checked at each step"),
}


def make_parser() -> ArgumentParser:
    """The parser of the whole command line; `command` names the module that runs it."""
    parser = ArgumentParser(
        prog="mla",
        description="Multi-head latent attention decode: what runs here, and is it right and fast?",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, text) in _COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=text))
    return parser
