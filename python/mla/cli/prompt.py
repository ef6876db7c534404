"""`mla bench --prompt`: tokens/s of a stack of layers, prompts and generation, and its memory."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from .console import console, make_progress, make_table
from .devices import device_name
from .prompt_stack import DTYPE, HIDDEN, PAGE_SIZE, Contender, Matmul, Paged, Step, make_layers
from .results import conditions_of, write_conditions

METHOD = (
    "attention layers of DeepSeek-V2-Lite with random weights in bf16, one request, prompts in "
    "ubatches; all ways in turns; tokens_per_s: CUDA graphs of the steps, replayed; "
    "eager_tokens_per_s: without graphs, with all that the host does; medians of the host's clock; "
    "buffer_mb: most memory that the last step has beside weights, caches and what it is given"
)


class Sizes(NamedTuple):
    layers: int
    ubatch: int
    prompts: tuple[int, ...]
    depths: tuple[int, ...]  # KV tokens before the one that is generated


ON_GPU = Sizes(27, 2048, (512, 1024, 2048, 4096, 8192, 16384), (0, 4096, 16384, 65535))
ON_CPU = Sizes(1, 16, (8, 40), (0, 20))


@dataclass(frozen=True)
class Entry:
    """One way on a prompt of `tokens`, or for one token behind `tokens` others."""

    kind: str  # "prompt" or "generation"
    tokens: int
    way: str
    tokens_per_s: float | None  # None without a GPU
    eager_tokens_per_s: float
    buffer_mb: float | None


def run(args: Namespace, device: torch.device) -> int:
    sizes = ON_GPU if device.type == "cuda" else ON_CPU
    entries: list[Entry] = []
    with torch.inference_mode(), make_progress() as progress:
        ways = contenders(sizes, device)
        hidden = torch.randn(1, sizes.ubatch, HIDDEN, device=device).to(DTYPE)
        work = [("prompt", n) for n in sizes.prompts] + [("generation", n) for n in sizes.depths]
        for kind, tokens in progress.track(work, description="lengths"):
            entries += measured(kind, tokens, ways, hidden, args.repeat or 5)
    _print(entries, device)
    if args.json:
        _write(args.json, entries)
        path = args.json.with_name(f"{args.json.stem}.meta.json")
        write_conditions(path, conditions_of(device, METHOD) | sizes._asdict())
        console.print(f"wrote {args.json}")
    return 0


def contenders(sizes: Sizes, device: torch.device) -> list[Contender]:
    """All with the same weights; the paged ones share their caches."""
    capacity = max(*sizes.prompts, max(sizes.depths) + 1)
    layers = make_layers(sizes.layers, capacity, device)
    pages = -(-capacity // PAGE_SIZE)
    shape = (pages, PAGE_SIZE, layers[0].config.d_qk)
    caches = [torch.zeros(shape, dtype=DTYPE, device=device) for _ in layers]
    table = torch.randperm(pages, device=device).int()[None]
    return [
        Matmul(layers, capacity),
        Paged("absorbed", layers, caches, table, "absorbed"),
        Paged("expanded", layers, caches, table, "expanded"),
        Paged("switch", layers, caches, table, None),
    ]


def measured(
    kind: str, tokens: int, ways: list[Contender], hidden: Tensor, repeat: int
) -> list[Entry]:
    """`repeat` times, all ways in turns."""
    device, ubatch = hidden.device, hidden.shape[1]
    if kind == "prompt":
        pieces = [(min(ubatch, tokens - at), at) for at in range(0, tokens, ubatch)]
    else:
        pieces = [(1, tokens)]
    count = sum(s for s, _ in pieces)

    def eager(way: Contender) -> Callable[[], None]:
        def call() -> None:
            for s, depth in pieces:
                way.step(hidden[:, :s], depth)()

        return call

    calls = {way.name: eager(way) for way in ways}
    for call in calls.values():
        call()
    eager_s = _in_turns(calls, repeat, device)
    found: dict[str, tuple[float | None, float | None]] = dict.fromkeys(calls, (None, None))
    if device.type == "cuda":
        buffers = {way.name: _buffer_mb(way, hidden, pieces[-1]) for way in ways}
        graphs = {way.name: _captured(way, hidden, pieces) for way in ways}
        graph_s = _in_turns(graphs, repeat, device)
        found = {name: (count / graph_s[name], buffers[name]) for name in calls}
    return [
        Entry(kind, tokens, name, found[name][0], count / eager_s[name], found[name][1])
        for name in calls
    ]


def _in_turns(
    calls: dict[str, Callable[[], None]], repeat: int, device: torch.device
) -> dict[str, float]:
    """Median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            _wait(device)
            start = perf_counter()
            call()
            _wait(device)
            seconds[name].append(perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _buffer_mb(way: Contender, hidden: Tensor, piece: tuple[int, int]) -> float:
    step = way.step(hidden[:, : piece[0]], piece[1], captured=True)
    _wait(hidden.device)
    torch.cuda.reset_peak_memory_stats(hidden.device)
    before = torch.cuda.memory_allocated(hidden.device)
    step()
    return (torch.cuda.max_memory_allocated(hidden.device) - before) / 2**20


def _captured(way: Contender, hidden: Tensor, pieces: list[tuple[int, int]]) -> Callable[[], None]:
    """Steps as CUDA graphs, which share their memory. Their first replays are done."""
    graphs: list[tuple[torch.cuda.CUDAGraph, Step, Tensor]] = []  # with what they read and write
    pool = torch.cuda.graph_pool_handle()
    for s, depth in pieces:
        step, graph = way.step(hidden[:, :s], depth, captured=True), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = step()
        graphs.append((graph, step, out))

    def call() -> None:
        for graph, _, _ in graphs:
            graph.replay()

    call()
    return call


def _write(path: Path, entries: list[Entry]) -> None:
    """A JSON list with one entry per line, numbers to a tenth."""

    def rounded(value: object) -> object:
        return round(value, 1) if isinstance(value, float) else value

    lines = [{name: rounded(value) for name, value in asdict(e).items()} for e in entries]
    path.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n", encoding="utf-8")


def _print(entries: list[Entry], device: torch.device) -> None:
    columns = ("tokens/s", "by matmul", "eager tokens/s", "by matmul", "buffer MB")
    table = make_table(f"layers, {device_name(device)}", "", "way", *columns, numbers=len(columns))
    base: Entry | None = None
    for e in entries:
        if e.way == "matmul":
            base = e
            table.add_section()
        assert base is not None
        speed = "-" if e.tokens_per_s is None else f"{e.tokens_per_s:.0f}"
        ratio = (
            f"{e.tokens_per_s / base.tokens_per_s:.2f}x"
            if e.tokens_per_s and base.tokens_per_s
            else "-"
        )
        table.add_row(
            f"{e.kind} {e.tokens}",
            e.way,
            speed,
            ratio,
            f"{e.eager_tokens_per_s:.1f}",
            f"{e.eager_tokens_per_s / base.eager_tokens_per_s:.2f}x",
            "-" if e.buffer_mb is None else f"{e.buffer_mb:.0f}",
        )
    console.print(table)
