"""The page of `mla bench --report`: one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from .arguments import UsageError
from .floors import Floors
from .report_plots import class_plots, roofline
from .results import Result, classes, geomean

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.15em 0.8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f4f4f4; padding: 0.8em; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
"""


def read_peers(path: Path) -> dict[str, dict[str, float]]:
    """Times of others: {case id: {name: microseconds}}, measured on the same kind of device."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(case): {str(name): float(us) for name, us in times.items()}
            for case, times in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"--peers {path}: expected {{case id: {{name: us}}}}: {error}") from None


def write(
    folder: Path,
    results: Sequence[Result],
    floors: Floors | None,
    conditions: Mapping[str, object],
    peers: Mapping[str, Mapping[str, float]],
) -> Path:
    """Makes the folder if need be, and index.html in it."""
    runs = list(dict.fromkeys(result.run for result in results))
    parts = [f"<h1>mla bench: {escape(str(conditions['device']))}</h1>"]
    parts += ["<h2>To repeat it</h2>", f"<pre>{escape(str(conditions['command']))}</pre>"]
    parts.append(_conditions(conditions))
    if floors:
        parts += ["<h2>Of the floor, by class</h2>", _classes_table(runs, results)]
    known = {case: times for case, times in peers.items() if times}
    if any(result.case.id in known for result in results):
        parts += ["<h2>Others</h2>", _peers_table(runs, results, known)]
    parts += ["<h2>Roofline</h2>", roofline(runs, results, floors)]
    parts += ["<h2>By class</h2>", class_plots(runs, results)]
    parts += ["<h2>Cases</h2>", _cases_table(results)]
    head = f'<meta charset="utf-8"><title>mla bench</title><style>{_STYLE}</style>'
    folder.mkdir(exist_ok=True)
    path = folder / "index.html"
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    path.write_text(page, encoding="utf-8")
    return path


def _conditions(conditions: Mapping[str, object]) -> str:
    rows = []
    for name, value in conditions.items():
        if name == "command" or value is None:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        rows.append((name.replace("_", " "), str(value)))
    return _table((), rows)


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(
        ["<table>", line(columns, "th"), *(line(row, "td") for row in rows), "</table>"]
    )


def _classes_table(runs: list[str], results: Sequence[Result]) -> str:
    rows = []
    for name, members in classes(results).items():
        cells = [name, str(len({result.case.id for result in members}))]
        for run in runs:
            of_floor = [r.of_floor for r in members if r.run == run and r.of_floor]
            cells.append(f"{geomean(of_floor):.2f} ({min(of_floor):.2f})" if of_floor else "-")
        rows.append(cells)
    text = "<p>Geometric mean, the worst case in brackets; 1 is the limit of this device.</p>"
    return text + _table(("class", "cases", *runs), rows)


def _peers_table(
    runs: list[str], results: Sequence[Result], peers: Mapping[str, Mapping[str, float]]
) -> str:
    """Ratios of others' times to ours, and to the best of them."""
    names = sorted({name for times in peers.values() for name in times})
    rows = []
    for name, members in classes(results).items():
        for run in runs:
            ours = [r for r in members if r.run == run and peers.get(r.case.id)]
            if not ours:
                continue
            best = [min(peers[r.case.id].values()) / r.timing.us for r in ours]
            cells = [name, run, str(len(ours)), f"{geomean(best):.2f}", f"{min(best):.2f}"]
            for peer in names:
                ratios = [
                    peers[r.case.id][peer] / r.timing.us for r in ours if peer in peers[r.case.id]
                ]
                cells.append(f"{geomean(ratios):.2f}" if ratios else "-")
            rows.append(cells)
    text = (
        "<p>Their time over ours, geometric means: above 1 we are faster. Theirs were recorded by "
        "the same method on the same kind of device, not in this process.</p>"
    )
    columns = ("class", "run", "cases", "best of them", "worst case", *names)
    return text + _table(columns, rows)


def _cases_table(results: Sequence[Result]) -> str:
    rows = [
        (
            result.case.id,
            result.run,
            result.variant,
            f"{result.timing.us:.2f}",
            f"{result.gbs:.4g}",
            f"{result.tflops:.4g}",
            f"{result.of_floor:.2f}" if result.of_floor else "-",
        )
        for result in results
    ]
    return _table(("case", "run", "variant", "us", "GB/s", "TFLOP/s", "of floor"), rows)
