"""Where elements lie in the Hopper pipelines' shared memory, against a model of what reads them.

The first part of kernels/sm90/tile.cuh is plain C++ but for the words before its functions: it is
compiled for the host and asked.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from mla import _mla

TILE = Path(__file__).parents[1] / "kernels" / "sm90" / "tile.cuh"
FIRST, END = "constexpr int kTileTokens", "// ---- where tokens are ----"
ROWS = [v for v in _mla.variants() if v["targets"] == "hopper"]
CHUNK = 64 * 128  # bytes of 64 rows of 64 columns

PROGRAM = """
#include <cstdint>
#define __host__
#define __device__
#define __forceinline__ inline
namespace mla::sm90 {{
{part}
}}
using namespace mla::sm90;
template <int DQk, int DV>
struct Shape {{ static constexpr int d_qk = DQk, d_v = DV, block_rows = 64, block_n = 64; }};
template <class C>
void layout(int* values) {{
  using L = TileLayout<C>;
  const int all[] = {{L::v_chunks, L::k_chunks, L::last_chunk, L::bytes, L::k_steps(0),
                     L::k_steps(L::k_chunks - 1)}};
  for (int value : all) *values++ = value;
}}
extern "C" {{
int swizzled_byte(int row, int unit) {{ return swizzled(row, unit); }}
uint64_t k_major_descriptor(uint32_t address) {{ return k_major(address); }}
uint64_t mn_major_descriptor(uint32_t address) {{ return mn_major(address); }}
uint64_t column_step() {{ return kColumnStep; }}
uint64_t token_step() {{ return kTokenStep; }}
uint64_t chunk_step() {{ return kChunkStep; }}
{layouts}
}}
"""


@pytest.fixture(scope="module")
def tile(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    text = TILE.read_text(encoding="utf-8")
    assert text.count(FIRST) == text.count(END) == 1
    part = text[text.index(FIRST) : text.index(END)]
    layouts = "".join(
        f"void layout_{d_qk}(int* values) {{ layout<Shape<{d_qk}, {d_v}>>(values); }}\n"
        for d_qk, d_v in {(v["d_qk"], v["d_v"]) for v in ROWS}
    )
    folder = tmp_path_factory.mktemp("tile")
    source, library = folder / "tile.cpp", folder / "tile.so"
    source.write_text(PROGRAM.format(part=part, layouts=layouts), encoding="utf-8")
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("k_major_descriptor", "mn_major_descriptor"):
        getattr(loaded, name).argtypes = [ctypes.c_uint32]
        getattr(loaded, name).restype = ctypes.c_uint64
    for name in ("column_step", "token_step", "chunk_step"):
        getattr(loaded, name).restype = ctypes.c_uint64
    return loaded


def swizzle(address: int) -> int:
    """What 128-byte swizzling does to an address: bits 4 to 6 ^= bits 7 to 9."""
    return address ^ (address >> 7 & 7) << 4


class Descriptor:
    """The fields of a wgmma descriptor, by the PTX manual; addresses and distances in bytes."""

    def __init__(self, bits: int) -> None:
        self.start = (bits & 0x3FFF) << 4
        self.leading = (bits >> 16 & 0x3FFF) << 4
        self.stride = (bits >> 32 & 0x3FFF) << 4
        self.base_offset, self.mode = bits >> 49 & 7, bits >> 62
        rest = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
        assert bits & ~rest == 0
        assert (self.base_offset, self.mode) == (0, 1), "swizzle of 128 bytes, on its own grid"

    def k_major(self, row: int, k: int) -> int:
        """The address of an element of a k-step of 16, of an operand whose rows lie along k."""
        return swizzle(self.start + row // 8 * self.stride + row % 8 * 128 + 2 * k)

    def mn_major(self, n: int, k: int) -> int:
        """The same where columns lie along n."""
        chunk, column = divmod(n, 64)
        offset = chunk * self.leading + k // 8 * self.stride + k % 8 * 128 + 2 * column
        return swizzle(self.start + offset)


def place(tile: ctypes.CDLL, row: int, column: int) -> int:
    """The byte of an element in a chunk as the pipelines write it: in units of 16 bytes."""
    return int(tile.swizzled_byte(row, column // 8)) + 2 * (column % 8)


BASES = [0, CHUNK, 9 * CHUNK, 25 * CHUNK]  # within 227 KB


def test_rows_are_written_as_tma_writes_them(tile: ctypes.CDLL) -> None:
    for row in range(64):
        for unit in range(8):
            assert tile.swizzled_byte(row, unit) == swizzle(row * 128 + unit * 16)


@pytest.mark.parametrize("base", BASES)
def test_operands_along_k_are_read_where_they_lie(tile: ctypes.CDLL, base: int) -> None:
    """Q, K and P: 64 rows, k-steps of 16 columns."""
    for step in range(4):
        bits = tile.k_major_descriptor(base) + step * tile.column_step()
        found = Descriptor(bits)
        assert bits == tile.k_major_descriptor(base + step * 32)
        for row in range(64):
            for k in range(16):
                assert found.k_major(row, k) == base + place(tile, row, 16 * step + k)


@pytest.mark.parametrize("base", BASES[:-1])
@pytest.mark.parametrize("columns", [128, 256])
def test_values_are_read_where_they_lie(tile: ctypes.CDLL, base: int, columns: int) -> None:
    """V: 64 tokens in k-steps of 16, columns over several chunks."""
    for step in range(4):
        found = Descriptor(tile.mn_major_descriptor(base) + step * tile.token_step())
        for k in range(16):
            for n in range(columns):
                at = base + n // 64 * CHUNK + place(tile, 16 * step + k, n % 64)
                assert found.mn_major(n, k) == at
    assert tile.mn_major_descriptor(base) + tile.chunk_step() == tile.mn_major_descriptor(
        base + CHUNK
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_tiles_hold_all_columns(tile: ctypes.CDLL, row: dict[str, int]) -> None:
    values = (ctypes.c_int * 6)()
    getattr(tile, f"layout_{row['d_qk']}")(values)
    v_chunks, k_chunks, last_chunk, size, k_steps, last_k_steps = values
    assert v_chunks * 64 == row["d_v"]
    assert k_chunks == -(-row["d_qk"] // 64)
    assert k_steps == 4
    assert 4 * (k_chunks - 1) + last_k_steps == row["d_qk"] // 16
    assert last_chunk == v_chunks
    assert size == k_chunks * CHUNK
    rows = row["block_rows"]
    q, p = size * rows // 64, CHUNK * rows // 64
    if row["pipeline"] == "sm90_swap":  # a ring of chunks, and P of two tiles
        assert row["stages"] >= 2 * k_chunks
        held = row["stages"] * CHUNK + q + 2 * p
    else:
        held = row["stages"] * size + q + p
    assert 0 < row["smem_bytes"] - held < 8192
