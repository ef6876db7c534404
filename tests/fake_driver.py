"""Runs scripts beside a stand-in libcuda (fake_cuda.cpp), and reads what they asked of it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nvidia
from compiler import HERE, compile_cpp
from mla import _mla


class Lengths(ctypes.Structure):
    _fields_ = [
        ("seq_lens", ctypes.c_uint64),
        ("cu_seqlens_q", ctypes.c_uint64),
        ("num_requests", ctypes.c_int32),
        ("s_q", ctypes.c_int32),
        ("total_q", ctypes.c_int32),
        ("h_q", ctypes.c_int32),
        ("max_len", ctypes.c_int64),
    ]


class FastDivisor(ctypes.Structure):
    _fields_ = [("multiplier", ctypes.c_uint32), ("shift", ctypes.c_uint32)]

    def divide(self, n: int) -> int:
        return n * self.multiplier >> self.shift


def _strides(name: str, *dims: str) -> list[tuple[str, Any]]:
    return [(f"{name}_{dim}", ctypes.c_int64) for dim in dims]


class TensorMap(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint64 * 16)]


class DecodeParams(ctypes.Structure):
    """kernels/params.h once more, so that an attribute bound to the wrong field is seen."""

    _anonymous_ = ("lengths",)
    _fields_ = [
        ("lengths", Lengths),
        ("q_nope", ctypes.c_uint64),
        ("q_rope", ctypes.c_uint64),
        *_strides("q_nope", "batch", "token", "head"),
        *_strides("q_rope", "batch", "token", "head"),
        ("latent", ctypes.c_uint64),
        ("rope", ctypes.c_uint64),
        *_strides("latent", "page", "token"),
        *_strides("rope", "page", "token"),
        ("block_table", ctypes.c_uint64),
        ("block_table_stride", ctypes.c_int64),
        ("num_pages", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("out", ctypes.c_uint64),
        *_strides("out", "batch", "token", "head"),
        ("lse", ctypes.c_uint64),
        *_strides("lse", "batch", "token", "head"),
        ("scale_log2", ctypes.c_float),
        ("causal", ctypes.c_int32),
        ("by_page_size", FastDivisor),
        ("by_h_q", FastDivisor),
        ("plan", ctypes.c_uint64),
        ("num_workers", ctypes.c_int32),
        ("batch_invariant", ctypes.c_int32),
        ("o_partial", ctypes.c_uint64),
        ("lse2_partial", ctypes.c_uint64),
        ("box_rows", ctypes.c_int32),
        ("_before_maps", ctypes.c_int32 * 5),  # maps are aligned to 64 bytes
        ("latent_map", TensorMap),
        ("rope_map", TensorMap),
    ]


class CombineParams(ctypes.Structure):
    """What the combine kernel gets of them."""

    _anonymous_ = ("lengths",)
    _fields_ = [
        ("lengths", Lengths),
        ("out", ctypes.c_uint64),
        *_strides("out", "batch", "token", "head"),
        ("lse", ctypes.c_uint64),
        *_strides("lse", "batch", "token", "head"),
        ("by_h_q", FastDivisor),
        ("plan", ctypes.c_uint64),
        ("o_partial", ctypes.c_uint64),
        ("lse2_partial", ctypes.c_uint64),
    ]


MERGED = ("o_a", "o_b", "out", "lse_a", "lse_b", "lse")


class MergeParams(ctypes.Structure):
    """kernels/common/merge.h once more."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in MERGED),
        *(field for name in MERGED for field in _strides(name, "batch", "token", "head")),
        *((name, ctypes.c_int32) for name in ("num_rows", "tokens", "heads")),
        *((name, ctypes.c_int32) for name in ("row_chunks", "row_threads", "rows_per_cta")),
        *((name, FastDivisor) for name in ("by_tokens", "by_heads", "by_row_threads")),
    ]


LENGTHS = [name for name, _ in Lengths._fields_]
FILLED_BY_LAUNCH = ("by_page_size", "by_h_q", "box_rows", "_before_maps", "latent_map", "rope_map")
ATTRIBUTES = LENGTHS + [
    name for name, _ in DecodeParams._fields_[1:] if name not in FILLED_BY_LAUNCH
]
COMBINED = LENGTHS + [name for name, _ in CombineParams._fields_[1:] if name != "by_h_q"]
WORKERS = 7
SET = "cuGraphExecKernelNodeSetParams"


def filled_params() -> _mla.DecodeParams:
    """Another value in each attribute."""
    params = _mla.DecodeParams()
    for value, name in enumerate(ATTRIBUTES, start=1000):
        setattr(params, name, float(value) if name == "scale_log2" else value)
    params.num_workers = WORKERS
    return params


def values_of(struct: ctypes.Structure, names: list[str]) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in names}


def params_of(launch: dict[str, Any]) -> DecodeParams | CombineParams:
    """The first parameter of a decode kernel or of its combine."""
    kind = CombineParams if "combine" in launch["kernel"] else DecodeParams
    return kind.from_buffer_copy(bytes.fromhex(launch["parameters"][0]))


@dataclass
class Done:
    """What a script printed and asked of the driver."""

    printed: str
    calls: list[dict[str, Any]]

    def named(self, call: str) -> list[dict[str, Any]]:
        return [c for c in self.calls if c["call"] == call]


def build_driver(folder: Path) -> None:
    """Makes libcuda.so.1 in a folder."""
    headers = [Path(root, "cu13/include") for root in nvidia.__path__]
    include = next(path for path in headers if (path / "cuda.h").is_file())
    options = ["-shared", "-fPIC", "-isystem", include]
    compile_cpp(HERE / "fake_cuda.cpp", folder / "libcuda.so.1", *options)


# `_mla` without the package around it: torch would only cost time.
PROLOGUE = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("mla._mla", {_mla.__file__!r})
_mla = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_mla)
"""
# A script's parameters: those of filled_params().
FILL = f"""
p = _mla.DecodeParams()
for value, name in enumerate({ATTRIBUTES!r}, start=1000):
    setattr(p, name, float(value) if name == "scale_log2" else value)
p.num_workers = {WORKERS}
"""


# The package, for which CPU tensors are those of an H200.
AS_H200 = """
import json, torch
import mla, mla.device
from mla import _mla
mla.device.CPU = mla.device.by_name("H200")
torch._C._cuda_getCurrentRawStream = {0: 77}.__getitem__  # by the device's number
"""


def run_script(script: str, driver: Path, log: Path, prologue: str = PROLOGUE, **env: str) -> Done:
    """Runs a script in which `_mla` is the extension; `driver` is the folder of libcuda.so.1."""
    log.write_text("")
    paths = {"LD_LIBRARY_PATH": str(driver), "FAKE_CUDA_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", prologue + script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **paths, **env},
    )
    assert done.returncode == 0, done.stderr
    return Done(done.stdout, [json.loads(line) for line in log.read_text().splitlines()])
