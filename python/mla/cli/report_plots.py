"""The plots of `mla bench --report`, as SVG for a page."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib

from .floors import Floors
from .results import Result

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MARKS = "osD^vP*X"


def roofline(runs: list[str], results: Sequence[Result], floors: Floors | None) -> str:
    """What is reached over how much arithmetic there is for a byte."""
    figure, axis = pyplot.subplots(figsize=(9, 5))
    intensity = [result.case.flop / result.case.io_bytes for result in results]
    if floors:
        span = [min(intensity) / 1.5, max(intensity) * 1.5]
        ridge = floors.matmul_tflops / floors.stream_tbs
        corners = sorted([*span, min(max(ridge, span[0]), span[1])])
        roof = [min(floors.matmul_tflops, x * floors.stream_tbs) for x in corners]
        label = f"{floors.stream_tbs:.2f} TB/s, {floors.matmul_tflops:.0f} TFLOP/s"
        axis.plot(corners, roof, color="black", linewidth=1, label=label)
    for run, mark in zip(runs, _MARKS * len(runs), strict=False):
        shown = [result for result in results if result.run == run]
        axis.scatter(
            [result.case.flop / result.case.io_bytes for result in shown],
            [result.tflops for result in shown],
            s=14,
            alpha=0.7,
            marker=mark,
            label=run,
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    return _svg(figure, [axis])


def class_plots(runs: list[str], results: Sequence[Result]) -> str:
    """A panel for each set of cases: of the floor (on a CPU: GB/s) over the KV tokens."""
    sets = list(dict.fromkeys(result.case.id.split("/")[0] for result in results))
    figure, axes = pyplot.subplots(1, len(sets), figsize=(4 * len(sets) + 1, 4), squeeze=False)
    on_gpu = all(result.floor_us for result in results)
    for axis, name in zip(axes[0], sets, strict=True):
        for run, mark in zip(runs, _MARKS * len(runs), strict=False):
            shown = [r for r in results if r.run == run and r.case.id.split("/")[0] == name]
            axis.scatter(
                [result.case.tokens for result in shown],
                [result.of_floor or result.gbs for result in shown],
                s=14,
                alpha=0.7,
                marker=mark,
                label=run,
            )
        axis.set(xscale="log", title=name, xlabel="KV tokens in the batch")
        if on_gpu:
            axis.set_ylim(0, 1.05)
    axes[0][0].set_ylabel("fraction of the floor" if on_gpu else "GB/s")
    return _svg(figure, list(axes[0]))


def _svg(figure: Figure, axes: Sequence[Axes]) -> str:
    """Text stays text; without what a file of its own begins with."""
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize="small")
    figure.tight_layout()
    target = StringIO()
    metadata: dict[str, Any] = {"Date": None}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(target, format="svg", metadata=metadata)
    pyplot.close(figure)
    text = target.getvalue()
    return text[text.index("<svg") :]
