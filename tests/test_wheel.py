"""What is installed: its files, what it links, its size, how fast and quietly it is imported."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from mla import _mla

EXTENSION = Path(_mla.__file__)
DISTRIBUTION = importlib.metadata.distribution("mla")
MAX_WHEEL_BYTES = 20 << 20
MAX_IMPORT_SECONDS = 0.5  # of this process's CPU, beside torch's own
# The C and C++ runtimes: neither torch, nor the CUDA runtime, nor the driver.
ALLOWED_LIBRARIES = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|ld-linux-[\w-]+)\.so\.\d"


def is_editable() -> bool:
    origin = json.loads(DISTRIBUTION.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


installed_wheel = pytest.mark.skipif(
    is_editable(), reason="an editable install has no wheel's files: install with `pip install .`"
)


def run(script: str, **env: str) -> str:
    """What a script prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@installed_wheel
def test_files() -> None:
    files = [str(file) for file in DISTRIBUTION.files or []]
    package = {file for file in files if file.startswith("mla/")}
    assert {"mla/__init__.py", "mla/_mla.abi3.so", "mla/_mla.pyi", "mla/py.typed"} <= package
    metadata = f"mla-{DISTRIBUTION.version}.dist-info/"
    elsewhere = [file for file in files if not file.startswith(("mla/", metadata))]
    assert [Path(f).name for f in elsewhere] == ["mla"], "the command and nothing else"
    suffixes = {Path(file).suffix for file in package} - {".pyc"}
    assert suffixes <= {".py", ".pyi", ".so", ".typed", ".txt", ".md", ".json"}
    assert sum(file.endswith(".so") for file in package) == 1


@installed_wheel
def test_one_wheel_serves_every_python() -> None:
    wheel = DISTRIBUTION.read_text("WHEEL") or ""
    tags = re.findall(r"^Tag: (\S+)$", wheel, re.MULTILINE)
    assert tags
    assert all(tag.startswith("cp310-abi3-") and "linux" in tag for tag in tags)


def test_metadata() -> None:
    metadata = DISTRIBUTION.metadata
    assert metadata["Requires-Python"] == ">=3.10"
    assert _mla.build_info()["version"] == DISTRIBUTION.version
    required = [r for r in DISTRIBUTION.requires or [] if "extra ==" not in r]
    assert sorted(re.split(r"[<>=]", r)[0] for r in required) == ["nanobind-backend", "torch"]


def test_extension_links_the_c_and_cpp_runtimes_only() -> None:
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--wide", EXTENSION], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed
    assert [name for name in needed if not re.fullmatch(ALLOWED_LIBRARIES, name)] == []
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    assert EXTENSION.name == "_mla.abi3.so"


def test_extension_is_small_and_knows_no_path_of_its_build() -> None:
    content = EXTENSION.read_bytes()
    assert len(zlib.compress(content)) < MAX_WHEEL_BYTES
    assert sum(_mla.images().values()) < len(content)
    for path in (b"/kernels/", b"/src/", b"/site-packages/"):
        assert path not in content


def test_images_are_those_of_the_table() -> None:
    rows = [row["name"] for row in _mla.variants() if row["pipeline"] != "cpu"]
    assert list(_mla.images()) == [
        "plan_sm80",
        "plan_sm90",
        "plan_parts_sm80",
        "plan_parts_sm90",
        "combine_sm80",
        "combine_sm90",
        "append",
        "merge",
        "stream",
        "empty",
        *rows,
    ]
    for name, size in _mla.images().items():
        image = _mla.image(name)
        assert len(image) == size
        assert image[:4] == bytes.fromhex("50ed55ba"), "the magic number of a fatbin"


def test_stub_has_what_the_module_has() -> None:
    stub = ast.parse(EXTENSION.with_name("_mla.pyi").read_text(encoding="utf-8"))
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    constants = {ast.unparse(node.target) for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert declared | constants == {name for name in vars(_mla) if not name.startswith("_")}
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    members = [node for node in classes["CudaError"].body if isinstance(node, ast.AnnAssign)]
    assert [ast.unparse(node) for node in members] == ["api: str", "code: int", "text: str"]
    assert issubclass(_mla.CudaError, RuntimeError)
    assert all(inspect.getdoc(getattr(_mla, name)) for name in declared)


def test_import_without_a_driver(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("")  # hides a driver that this machine may have
    problem = run(
        "import mla\nfrom mla import _mla\nprint(_mla.driver_problem())",
        LD_LIBRARY_PATH=str(tmp_path),
        CUDA_VISIBLE_DEVICES="",
    )
    assert problem.startswith("mla needs an NVIDIA driver >= ")


def test_import_is_fast() -> None:
    script = """
import time, torch
start = time.process_time()
import mla
print(time.process_time() - start)
"""
    assert float(run(script)) < MAX_IMPORT_SECONDS


def test_import_of_the_extension_opens_no_cuda_library() -> None:
    script = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("mla._mla", {str(EXTENSION)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(open("/proc/self/maps").read())
"""
    maps = run(script)
    assert EXTENSION.name in maps
    assert not re.search(r"libcuda|libcudart|libtorch|libc10", maps)
