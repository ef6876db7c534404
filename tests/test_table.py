"""The table of variants, and whoever repeats a part of it."""

from __future__ import annotations

import re
from pathlib import Path

import mla
import pytest
import torch
from mla import _mla, launch, workspace
from mla.checks import D_V, DTYPES
from mla.problem import Problem
from mla.variants import VARIANTS, Variant

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "kernels" / "variants.inc"
GPU_VARIANTS = [variant for variant in VARIANTS if not variant.on_host]

SIZES = Problem.from_sizes(b=7, h_q=40, d_qk=576, dtype=torch.bfloat16, page_size=64, max_pages=100)

each = pytest.mark.parametrize("variant", GPU_VARIANTS, ids=lambda variant: variant.name)


def test_rows_are_those_of_the_file() -> None:
    if not TABLE.exists():
        pytest.skip("needs kernels/variants.inc: the tests were copied out of the repository")
    text = TABLE.read_text(encoding="utf-8")
    rows = [
        re.split(r",\s*", row)
        for row in re.findall(r"^MLA_VARIANT\((.*)\)\s*$", text, re.MULTILINE)
    ]
    assert len(rows) == len(GPU_VARIANTS)
    for row, v in zip(rows, GPU_VARIANTS, strict=True):
        dtypes = "_".join({"bfloat16": "bf16", "float16": "fp16"}[name] for name in v.dtypes)
        sizes = (v.d_qk, v.d_v, v.block_rows, v.block_n, v.stages, v.warps, v.smem_bytes)
        assert row == [v.pipeline, dtypes, *map(str, sizes), str(v.page_multiple), v.targets]
    hosts = re.findall(r"^MLA_HOST_VARIANT\((\w+)\)", text, re.MULTILINE)
    assert hosts == [v.name for v in VARIANTS if v.on_host]


def test_names_are_unique_and_no_pipeline() -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)
    assert not {v.name for v in GPU_VARIANTS} & {v.pipeline for v in VARIANTS}


def test_the_public_view() -> None:
    assert mla.variants() is VARIANTS
    assert isinstance(VARIANTS[0], Variant)
    with pytest.raises(AttributeError):
        VARIANTS[0].stages = 7  # type: ignore[misc]


def test_the_host_variant() -> None:
    (host,) = (variant for variant in VARIANTS if variant.on_host)
    assert host.name == host.pipeline == "cpu"
    assert workspace.bytes_needed(host, SIZES, 100, None) == 0


@each
def test_name_says_the_row(variant: Variant) -> None:
    v = variant
    assert v.name == f"{v.pipeline}_r{v.block_rows}_n{v.block_n}_s{v.stages}_d{v.d_qk}"


@each
def test_limits_make_sense(variant: Variant) -> None:
    assert D_V[variant.d_qk] == variant.d_v
    assert variant.dtypes
    assert set(variant.dtypes) <= set(DTYPES.values())
    assert variant.block_rows % 16 == variant.block_n % 16 == 0
    assert variant.stages >= 1
    assert 1 <= variant.warps <= 32
    assert variant.page_multiple >= 1
    assert variant.min_sm >= 80


@each
def test_shared_memory_fits_the_gpus_that_it_is_for(variant: Variant) -> None:
    assert 0 < variant.smem_bytes <= variant.smem_limit
    kib = {"ampere_163k": 163, "ampere_99k": 99, "hopper": 227}[variant.targets]
    assert variant.smem_limit == kib * 1024


@each
def test_workspace_formula(variant: Variant) -> None:
    rows = (2 * 132 + 1) * variant.block_rows
    needed = workspace.bytes_needed(variant, SIZES, 132, SIZES.max_len)
    assert needed == rows * (2 * variant.d_v + 36)


@each
@pytest.mark.parametrize(
    ("max_len", "parts"),
    [(1025, 2), (4096, 4), (8192, 8), (16384, 16), (65537, 33), (131072, 46), (10**6, 64)],
)
def test_batch_invariant_workspace_formula(variant: Variant, max_len: int, parts: int) -> None:
    """What python/mla/workspace.py documents, uniform and ragged."""
    for ragged in (False, True):
        sizes = SIZES._replace(batch_invariant=True, ragged=ragged)
        row_blocks = 7 * -(-SIZES.h_q // variant.block_rows)
        if ragged:
            row_blocks = -(-7 * SIZES.h_q // variant.block_rows) + 7
        of_each = 1 if ragged else row_blocks // 7
        several = ragged or of_each > 1
        slots = 7 * max(parts, min(8, -(-max_len // 512)) if several else 0) + row_blocks
        if max_len <= (512 * (of_each + 1) if of_each < 8 else 1024 * of_each):
            slots = 0
        needed = workspace.bytes_needed(variant, sizes, 132, max_len)
        assert needed == slots * variant.block_rows * (2 * variant.d_v + 36)
        pieces = max(slots, row_blocks)
        params = launch.sizes(sizes, num_workers=132, max_len=max_len)
        schedule = 48 + 64 * 132 + 32 * pieces + 32 * row_blocks + 16 * 7
        assert _mla.plan_bytes(variant.name, params) == schedule


@each
@pytest.mark.parametrize(("s_q", "total_q"), [(1, None), (3, None), (0, 29)])
def test_schedule_formula(variant: Variant, s_q: int, total_q: int | None) -> None:
    """What python/mla/workspace.py documents."""
    b, h_q, workers = 7, 40, 108
    params = _mla.DecodeParams()
    params.num_requests, params.s_q, params.h_q, params.num_workers = b, s_q, h_q, workers
    row_blocks = b * -(-s_q * h_q // variant.block_rows)
    if total_q is not None:
        params.total_q, params.cu_seqlens_q = total_q, 1
        row_blocks = -(-total_q * h_q // variant.block_rows) + b
    expected = 48 + 128 * workers + 32 * row_blocks + 12 * (b + 1)
    assert _mla.plan_bytes(variant.name, params) == expected


@each
def test_has_an_image(variant: Variant) -> None:
    assert _mla.images()[variant.name] == len(_mla.image(variant.name)) > 0


def test_images_are_of_the_table() -> None:
    names = {
        *(
            f"{kernel}_{since}"
            for kernel in ("plan", "plan_parts", "combine")
            for since in ("sm80", "sm90")
        ),
        "append",
        "merge",
        "stream",
        "empty",
        *(v.name for v in GPU_VARIANTS),
    }
    assert set(_mla.images()) == names


@each
def test_architecture_is_that_of_the_pipeline(variant: Variant) -> None:
    assert variant.pipeline.partition("_")[0] == f"sm{variant.min_sm}"
    assert variant.exact_sm == (variant.targets == "hopper")


@pytest.mark.parametrize("d_qk", D_V)
@pytest.mark.parametrize("targets", ["ampere_163k", "ampere_99k"])
def test_every_problem_has_its_tiles(d_qk: int, targets: str) -> None:
    rows = [v for v in GPU_VARIANTS if (v.pipeline, v.d_qk, v.targets) == ("sm80", d_qk, targets)]
    assert sorted(v.block_rows for v in rows) == [16, 32, 64]
    assert all(set(v.dtypes) == set(DTYPES.values()) for v in rows)


@pytest.mark.parametrize("d_qk", D_V)
@pytest.mark.parametrize(
    ("pipeline", "block_rows"), [("sm90_2wg", 64), ("sm90_3wg", 64), ("sm90_swap", 16)]
)
def test_every_problem_has_its_hopper_tile(d_qk: int, pipeline: str, block_rows: int) -> None:
    (row,) = (v for v in GPU_VARIANTS if (v.pipeline, v.d_qk) == (pipeline, d_qk))
    assert (row.targets, row.block_rows, row.block_n) == ("hopper", block_rows, 64)
    assert set(row.dtypes) == set(DTYPES.values())
