"""The picture of `mla bench --plot`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .results import Result

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(path: Path, title: str, results: list[Result]) -> None:
    """Fraction of the floor (on a CPU: GB/s) over the KV tokens in the batch, a panel for each run.

    Colours are numbers of query rows per request.
    """
    runs = list(dict.fromkeys(result.run for result in results))
    rows = sorted({_rows(result) for result in results})
    on_gpu = all(result.floor_us for result in results)
    figure, axes = pyplot.subplots(
        1, len(runs), figsize=(6.4 * len(runs), 4.8), sharey=True, squeeze=False
    )
    for axis, run in zip(axes[0], runs, strict=True):
        for i, n in enumerate(rows):
            shown = [result for result in results if result.run == run and _rows(result) == n]
            axis.scatter(
                [result.case.tokens for result in shown],
                [result.of_floor or result.gbs for result in shown],
                s=22,
                color=pyplot.get_cmap("viridis")(i / len(rows)),
                label=f"{n} rows",
            )
        axis.set(xscale="log", title=run, xlabel="KV tokens in the batch")
        axis.grid(alpha=0.3)
        if on_gpu:
            axis.set_ylim(0, 1.05)
    axes[0][0].set_ylabel("fraction of the floor" if on_gpu else "GB/s")
    axes[0][-1].legend(title="per request", fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _rows(result: Result) -> int:
    """Query rows of each request."""
    return result.case.s_q * result.case.h_q
