"""The page of `mla bench --report`."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import Output, command
from mla.cli import cases, report, results, timing
from test_bench import FLOORS, case_entry


class Page(HTMLParser):
    """Tags that were opened and closed, and what refers to anything else."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(folder: Path) -> tuple[str, Page]:
    text = (folder / "index.html").read_text(encoding="utf-8")
    return text, Page(text)


def measured(tmp_path: Path) -> list[results.Result]:
    path = tmp_path / "cases.json"
    entries = [
        case_entry(),
        case_entry(id="mtp/small", s_q=2, causal=True),
        case_entry(id="main/long", b=1, seq_lens=[90_000], h_q=128),
    ]
    path.write_text(json.dumps(entries))
    found = []
    for case in cases.load_cases(path):
        floor_us = FLOORS.case_us(case.io_bytes, case.flop)
        for run, factor in (("heuristic", 2.0), ("<b>other</b>", 4.0)):
            time = timing.Timing(factor * floor_us, 20.0)
            found.append(results.Result(run, case, f"{run} row", time, floor_us))
    return found


CONDITIONS = {
    "command": "mla bench --cases 'a & b.json'",
    "commit": None,
    "device": "GPU <1>",
    "floors": {"launch_us": 3.0},
}


def test_everything_is_in_the_page(tmp_path: Path) -> None:
    found = measured(tmp_path)
    us = {result.case.id: result.timing.us for result in found if result.run == "heuristic"}
    peers = {case: {"theirs": 1.5 * time, "slow": 9 * time} for case, time in us.items()}
    path = report.write(tmp_path / "page", found, FLOORS, CONDITIONS, peers)
    assert path == tmp_path / "page" / "index.html"
    text, parsed = page(tmp_path / "page")
    assert not parsed.open
    assert not parsed.outside
    assert parsed.tags.count("svg") == 2
    assert "script" not in parsed.tags
    assert "GPU &lt;1&gt;" in text
    assert "<pre>mla bench --cases &#x27;a &amp; b.json&#x27;</pre>" in text
    assert "<b>" not in text
    assert "0.50 (0.50)" in text  # of the floor
    assert re.search(r"<td>all</td><td>heuristic</td><td>3</td><td>1.50</td><td>1.50</td>", text)
    assert re.search(r"<td>1.50</td><td>9.00</td><td>1.50</td>|<th>slow</th><th>theirs</th>", text)
    assert "4.60 TB/s, 790 TFLOP/s" in text  # the roof
    for result in found:
        assert f"<td>{result.case.id}</td>" in text
        assert f"<td>{result.timing.us:.2f}</td>" in text


def test_without_floors_and_others(tmp_path: Path) -> None:
    found = [replace(result, floor_us=None) for result in measured(tmp_path)]
    report.write(tmp_path, found, None, CONDITIONS, {"of/another list": {"theirs": 1.0}})
    text, parsed = page(tmp_path)
    assert parsed.tags.count("svg") == 2
    assert "Of the floor, by class" not in text
    assert "Others" not in text
    assert "GB/s" in text


def test_bench_writes_it(tmp_path: Path, capsys: Output) -> None:
    case_file, peers = tmp_path / "cases.json", tmp_path / "peers.json"
    case_file.write_text(json.dumps([case_entry(peer_us={"theirs": 9.0})]))
    peers.write_text(json.dumps({"main/small": {"another": 7.0}}))
    options = f"--device cpu --cases {case_file} --repeat 1 --peers {peers}"
    assert command(f"bench {options} --report {tmp_path / 'page'}") == 0
    assert "index.html" in capsys.readouterr().out
    text, _ = page(tmp_path / "page")
    assert "<th>another</th><th>theirs</th>" in text
    assert "mla " in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--report {folder}/none/page", "no such folder"),
        ("--peers {folder}/peers.json", "--peers belongs to --report"),
        ("--report {folder} --peers {folder}/none.json", "expected {case id: {name: us}}"),
        ("--report {folder} --peers {folder}/cases.json", "expected {case id: {name: us}}"),
        ("--report {folder} --peers x --page-size 1", "without other sizes"),
    ],
)
def test_asks_first(options: str, message: str, tmp_path: Path, capsys: Output) -> None:
    case_file = tmp_path / "cases.json"
    case_file.write_text(json.dumps([case_entry()]))
    line = options.replace("{folder}", str(tmp_path))
    assert command(f"bench --device cpu --cases {case_file} {line}") == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    case_file = tmp_path / "cases.json"
    case_file.write_text(json.dumps([case_entry()]))
    monkeypatch.delitem(sys.modules, "mla.cli.report")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(f"bench --device cpu --cases {case_file} --report {tmp_path}") == 2
    assert "needs matplotlib: pip install 'mla[cli]'" in capsys.readouterr().err
