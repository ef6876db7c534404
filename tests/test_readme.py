"""The documents say what is so.

Held to the package: the support table, the two commands, the examples, the environment variables.
Held to the tree: links, names of files, and words that do not belong.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import mla
import pytest
from mla import _mla
from mla.support_table import support_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "kernels/**/*.md", "benchmarks/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
REFUSED = {
    "paths of one machine": r"(?<![\w.:/)\]*<>~-])/(?!usr/local/cuda)(?:[\w.+-]+/)+[\w.+-]*",
    "issues without their repository": r"(?<![\w/&])#\d+\b",
    "unfinished text": r"\b(?:TODO|FIXME|XXX|TBD)\b",
    "pictographs": "[\u2600-\u27bf\U0001f000-\U0001faff]",
    "praise": r"(?i)\b(?:blazing|seamless|cutting-edge|state-of-the-art|effortless|revolutionary)",
}

in_repository = pytest.mark.skipif(
    not (ROOT / ".ci").exists(), reason="these tests were copied out of the repository"
)
documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def module_output(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_support_table_is_what_the_table_of_variants_says() -> None:
    begin, end = (
        "<!-- support-table: `python -m mla.support_table` -->",
        "<!-- end of support-table -->",
    )
    marked = README.partition(begin)[2].partition(end)[0].strip("\n")
    assert marked == support_table(), "paste what `python -m mla.support_table` prints"
    assert module_output("mla.support_table") == support_table() + "\n"


def test_support_table_leaves_no_variant_out() -> None:
    rows = support_table().splitlines()[2:]
    for variant in mla.variants():
        words = [f"`{variant.pipeline}`", *variant.dtypes]
        if not variant.on_host:
            words += [f"{variant.d_qk}/{variant.d_v}", str(variant.block_rows)]
        assert any(all(word in row for word in words) for row in rows), variant


@in_repository
def test_ci_runs_the_two_commands_of_the_readme() -> None:
    ci_run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    greps = dict(re.findall(r"^(\w+)=\$\(grep -m1 -x '(.*)' README\.md\)$", ci_run, re.MULTILINE))
    found = {
        name: [line for line in README.splitlines() if re.fullmatch(grep, line)]
        for name, grep in greps.items()
    }
    assert found == {
        "demo_command": ["pip install '.[cli]' && mla demo"],
        "test_command": ["pip install '.[test]' && python -m pytest"],
    }
    for name, (command,) in found.items():
        assert f"{command}\n" in code_blocks("sh")
        assert f'bash -euo pipefail -c "${name}"' in ci_run


def test_the_commands_exist() -> None:
    extras = importlib.metadata.metadata("mla").get_all("Provides-Extra") or []
    assert {"cli", "test"} <= set(extras)
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="mla")
    with pytest.raises(SystemExit) as stop:
        script.load()(["demo", "--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`mla (\w+)", README))))
def test_subcommands_exist(name: str) -> None:
    assert f"usage: mla {name}" in module_output("mla", name, "--help")


def test_examples_run() -> None:
    blocks = code_blocks("python")
    assert blocks
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_names_exist() -> None:
    """What is called `mla.x` is there; behind `import mla`, but for the interfaces of others."""
    names = set(re.findall(r"`mla\.([\w.]+)", README))
    assert {"decode", "checkpoint", "models.MODELS", "compat.flash_mla"} <= names
    for name in names:
        pkgutil.resolve_name(f"mla.{name}")
        assert name.split(".")[0] in [*mla.__all__, "compat"], name


def test_environment_variables_are_those_read() -> None:
    row = r"^\| `(MLA_\w+)` \| (at run time|by the build) \|"
    named = dict(re.findall(row, README, re.MULTILINE))
    package = [Path(_mla.__file__), *Path(mla.__file__).parent.rglob("*.py")]
    read = {
        name.decode()
        for path in package
        for name in re.findall(rb"""["'\0](MLA_[A-Z]\w*)(?=["'\0])""", path.read_bytes())
    }
    assert {name for name in named if named[name] == "at run time"} == read
    assert {name for name in named if named[name] == "by the build"} == {"MLA_SYSTEM_CUDA"}


def test_driver_is_the_one_that_the_build_needs() -> None:
    build = mla.info()["build"]
    if build["compiler"] != "pypi":
        pytest.skip("the README speaks of the wheels: this build used an installed toolkit")
    stated = README.partition("<!-- driver -->")[2].partition("<!-- end of driver -->")[0]
    assert stated.strip() == build["min_driver"]


@in_repository
@documents
def test_relative_links_resolve(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in local if not (document.parent / link).exists()] == []


@in_repository
@documents
def test_files_named_exist(document: Path) -> None:
    """A path in backticks that begins with a folder of the repository leads somewhere."""
    folders = r"python|src|kernels|cmake|tests|benchmarks|\.ci|\.github"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", document.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


@in_repository
@documents
@pytest.mark.parametrize("what", REFUSED)
def test_documents_are_free_of(document: Path, what: str) -> None:
    text = document.read_text(encoding="utf-8")
    assert [match[0] for match in re.finditer(REFUSED[what], text)] == []
