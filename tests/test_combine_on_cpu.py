"""Merging partial results on the CPU: what combine.cu and partials.cuh make of them, bit for bit.

They run in a stand-in for a CTA (combine_on_cpu.cpp) with C++ in the place of their few PTX
instructions, and so does what stores partial results in the Hopper pipelines.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from compiler import HERE, KERNELS, compile_cpp
from torch import Tensor

# PTX, and what it does.
STAND_INS = {
    "dtype.cuh": {
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));': (
            "bits = bf16_bits(low) | bf16_bits(high) << 16;"
        ),
        'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));': (
            "bits = fp16_bits(low) | fp16_bits(high) << 16;"
        ),
        'asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));': "x = of_fp16(bits);",
    },
    "math.cuh": {
        'asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));': "y = std::exp2(x);",
        'asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));': "y = 1.f / x;",
    },
    "partials.cuh": {
        'asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(words[i]) : "r"(words[i]));': (
            "words[i] = transposed(words[i]);"
        ),
    },
}
NEG_INF = -torch.inf


class Merged(NamedTuple):
    out: Tensor  # [items, rows, d_v], 16 bits
    lse: Tensor  # [items, rows], natural logarithm


class Combine:
    """The program of combine_on_cpu.cpp, asked problem by problem."""

    def __init__(self, folder: Path) -> None:
        kernels = shutil.copytree(KERNELS, folder / "kernels")
        for name, instructions in STAND_INS.items():
            header = kernels / "common" / name
            text = header.read_text(encoding="utf-8")
            for ptx, cpp in instructions.items():
                assert text.count(ptx) == 1, ptx
                text = text.replace(ptx, cpp)
            header.write_text(text, encoding="utf-8")
        program = folder / "combine_on_cpu"
        compile_cpp(HERE / "combine_on_cpu.cpp", program, "-O1", "-I", HERE, kernels=kernels)
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(
        self,
        o: Tensor,  # [items, parts, rows, d_v]
        lse2: Tensor,  # [items, parts, rows]
        dtype: torch.dtype = torch.bfloat16,
        grid: int = 1,
        block_rows: int = 16,
        backward: bool = False,
        few: bool = True,
    ) -> Merged:
        items, parts, rows, d_v = o.shape
        fp16 = dtype == torch.float16
        sizes = (items, parts, rows, d_v, block_rows, fp16, few, grid, backward)
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(struct.pack("9i", *sizes))
        for tensor in (o, lse2):
            self.process.stdin.write(tensor.contiguous().numpy().tobytes())
        self.process.stdin.flush()
        numbers = items * rows * d_v
        answer = bytearray(self.process.stdout.read(2 * numbers + 4 * items * rows))
        return Merged(
            torch.frombuffer(answer, dtype=dtype, count=numbers).view(items, rows, d_v),
            torch.frombuffer(answer, dtype=torch.float32, offset=2 * numbers).view(items, rows),
        )


@pytest.fixture(scope="module")
def combine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Combine]:
    program = Combine(tmp_path_factory.mktemp("combine"))
    yield program
    program.process.communicate()
    assert program.process.returncode == 0


def problem(items: int, parts: int, rows: int, d_v: int = 256) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(items * 1000 + parts)
    o = torch.randn(items, parts, rows, d_v, generator=made) / 10
    return o, torch.randn(items, parts, rows, generator=made) * 4


def merged(o: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """In float64."""
    weights = torch.softmax(lse2.double() * torch.tensor(2.0).double().log(), 1)
    lse = torch.logsumexp(lse2.double() * torch.tensor(2.0).double().log(), 1)
    return (weights.nan_to_num().unsqueeze(-1) * o.double()).sum(1), lse


def ctas_if_shared(o: Tensor, warps: int = 8) -> int:
    """With so many, this many warps share the parts of 16 rows and columns."""
    items, _, rows, d_v = o.shape
    return -(-items * -(-rows // 16) * (d_v // 16) * warps // 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("items", "parts", "rows", "d_v", "block_rows"),
    [
        (1, 2, 16, 256, 16),
        (3, 3, 5, 256, 64),
        (2, 5, 20, 512, 16),
        (1, 12, 16, 256, 16),
        (1, 28, 16, 256, 16),
        (1, 33, 16, 256, 16),
        (2, 70, 40, 256, 32),
        (1, 132, 3, 512, 64),
    ],
)
def test_is_the_sum(
    items: int,
    parts: int,
    rows: int,
    d_v: int,
    block_rows: int,
    dtype: torch.dtype,
    combine: Combine,
) -> None:
    """Within the rounding of partial results and of the output; the same bits however many warps
    share the parts, in both forms of the kernel, and in whatever order threads run."""
    o, lse2 = problem(items, parts, rows, d_v)
    expected, expected_lse = merged(o, lse2)
    first = combine(o, lse2, dtype, grid=1, block_rows=block_rows)
    error = (first.out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (2.5e-3 if dtype == torch.bfloat16 else 4e-4)
    torch.testing.assert_close(first.lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    grids = {ctas_if_shared(o, warps) for warps in (8, 4, 2, 1)}
    assert len(grids) == 4
    runs = [(grid, few, not few) for grid in sorted(grids) for few in (True, False)]
    for grid, few, backward in [*runs, (max(grids), True, True)]:
        other = combine(o, lse2, dtype, grid, block_rows, backward, few)
        assert torch.equal(other.out.view(torch.int16), first.out.view(torch.int16))
        assert torch.equal(other.lse, first.lse)


def test_rows_without_tokens(combine: Combine) -> None:
    """A part in which a row saw nothing counts nothing; a row that saw nothing at all is zero."""
    o, lse2 = problem(1, 6, 16)
    o[:, 2:5, 4] = 0
    lse2[:, 2:5, 4] = NEG_INF
    o[:, :, 7] = 0
    lse2[:, :, 7] = NEG_INF
    for grid in (1, ctas_if_shared(o)):
        got = combine(o, lse2, grid=grid)
        expected, expected_lse = merged(o, lse2)
        torch.testing.assert_close(got.out.double(), expected, rtol=0.01, atol=1e-4)
        assert (got.out[:, 7] == 0).all()
        torch.testing.assert_close(got.lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("exponent", [-90, -40, -14, 20, 60, 110])
def test_the_range_of_bf16(exponent: int, combine: Combine) -> None:
    """Rows of any size beside rows of another, and columns that are 2^12 times less than others."""
    o, lse2 = problem(1, 5, 16)
    o[:, :, ::3] *= 2.0**exponent
    o[..., 5::16] *= 2.0**-12
    got = combine(o, lse2).out.double()
    expected, _ = merged(o, lse2)
    for chosen in (got[:, ::3], expected[:, ::3]), (got[:, 1::3], expected[:, 1::3]):
        for columns in (slice(5, None, 16), slice(6, None, 16)):
            x, y = (it[..., columns] / it[..., columns].abs().max() for it in chosen)
            assert (x - y).square().mean().sqrt() / y.square().mean().sqrt() < 6e-3


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number(value: float, combine: Combine) -> None:
    """It comes out where it went in, and nowhere else."""
    o, lse2 = problem(1, 5, 16)
    clean = combine(o, lse2)
    o[0, 3, 9, 100] = value
    got = combine(o, lse2)
    assert torch.equal(got.out[0, 9, 100].isnan(), torch.tensor(value).isnan())
    assert not got.out[0, 9, 100].isfinite()
    elsewhere = torch.ones(16, 256, dtype=torch.bool)
    elsewhere[9, 100] = False
    torch.testing.assert_close(got.out[0][elsewhere], clean.out[0][elsewhere], rtol=0.01, atol=1e-4)
