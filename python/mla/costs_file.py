"""The file of a GPU's constants: JSON, the same for the built-in one and those of `mla tune`."""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from .variants import VARIANTS

FORMAT = 4


class Costs(NamedTuple):
    """What limits the variants of one class (pipeline and image set) on one GPU."""

    start_us: float  # a call without work: launches, the first KV, one tile's chain, writing
    busy_us: float  # what it takes longer where all workers begin with it at once
    height_us: float  # an item, for each row of its tile, whether a query row fills it or not
    row_us: float  # a query row of an item, into its tile and out of it
    tiles_us: float  # an item of more than one tile
    item_us: float  # each further item of a worker, beside its rows and tiles
    split_us: float  # a call with items that are split
    pair_us: float  # where the items that are split have two parts, as the later worker merges them
    part_us: float  # each further part of an item that is split
    merge_gbs: float  # partial results, written and read once
    bandwidth_gbs: float
    small_pages: float  # by this share reading takes longer where pages have at most 16 tokens
    box_us: float  # what an item takes longer with pages that TMA has boxes for: maps, first box
    copy_gbs_per_sm: float  # into shared memory, of pages that TMA has no boxes for; 0: no limit
    copy_start_us: float  # what a call takes longer with other pages
    shared_copy: float  # by this share copying takes longer where row blocks share KV
    tflops_per_sm: Mapping[int, float]  # by packed rows of a tile, padding included, at 576/512


MAY_BE_ZERO = (
    *("busy_us", "height_us", "row_us", "tiles_us", "item_us", "split_us", "pair_us", "part_us"),
    *("small_pages", "box_us", "copy_gbs_per_sm", "copy_start_us", "shared_copy"),
)


class CostsFile(NamedTuple):
    gpu: str
    sm_count: int
    classes: dict[str, Costs]


def table_version() -> str:
    """Changes when a variant comes or goes."""
    names = "\n".join(f"{variant.name} {variant.targets}" for variant in VARIANTS)
    return f"{zlib.crc32(names.encode()):08x}"


def dump(gpu: str, sm_count: int, classes: Mapping[str, Costs], made: Mapping[str, object]) -> str:
    """`made`: when, how and from what; nobody reads it but people."""
    rounded = {
        key: {
            field: four_digits(value)
            if isinstance(value, float | int)
            else {str(rows): four_digits(rate) for rows, rate in value.items()}
            for field, value in costs._asdict().items()
        }
        for key, costs in classes.items()
    }
    content = {
        "format": FORMAT,
        "table": table_version(),
        "gpu": gpu,
        "sm_count": sm_count,
        "made": dict(made),
        "classes": rounded,
    }
    return json.dumps(content, indent=1) + "\n"


def four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def parse(text: str, table: str | None) -> CostsFile:
    """ValueError, with what was got and what is expected, unless all of it can be used.

    `table` is the version of the table of variants that it must be for; None for any.
    """
    try:
        content = json.loads(text)
    except ValueError as error:  # RecursionError is none of a file that anybody wrote
        raise ValueError(f"got no JSON ({error}), expected an object") from None
    if not isinstance(content, dict):
        raise ValueError(f"got {type(content).__name__}, expected an object")
    for key, expected in (("format", FORMAT), ("table", table)):
        if expected is not None and content.get(key) != expected:
            raise ValueError(f"{key}: got {content.get(key)!r}, expected {expected!r}")
    gpu, sm_count = content.get("gpu"), content.get("sm_count")
    if not isinstance(gpu, str) or type(sm_count) is not int:
        raise ValueError(f"gpu, sm_count: got {gpu!r}, {sm_count!r}, expected a name and a number")
    found = content.get("classes")
    rows = rows_by_class()
    if not isinstance(found, dict) or found.keys() != rows.keys():
        got = ", ".join(map(str, found)) if isinstance(found, dict) else repr(found)
        raise ValueError(f"classes: got {got}, expected {', '.join(rows)}")
    return CostsFile(gpu, sm_count, {key: _costs(key, found[key], rows[key]) for key in rows})


def rows_by_class() -> dict[str, set[int]]:
    """The classes of the table, and the `block_rows` that each has."""
    rows: dict[str, set[int]] = {}
    for variant in VARIANTS:
        if not variant.on_host:
            rows.setdefault(f"{variant.pipeline}.{variant.targets}", set()).add(variant.block_rows)
    return rows


def _costs(name: str, found: Any, rows: set[int]) -> Costs:
    if not isinstance(found, dict) or found.keys() != set(Costs._fields):
        got = ", ".join(map(str, found)) if isinstance(found, dict) else repr(found)
        raise ValueError(f"{name}: got {got}, expected {', '.join(Costs._fields)}")
    rates = found["tflops_per_sm"]
    if not isinstance(rates, dict) or rates.keys() != {str(n) for n in rows}:
        raise ValueError(f"{name}, tflops_per_sm: got {rates!r}, expected rows {sorted(rows)}")
    values = {key: value for key, value in found.items() if key != "tflops_per_sm"}
    values |= {f"tflops_per_sm of {key}": value for key, value in rates.items()}
    for key, value in values.items():
        least = 0 if key in MAY_BE_ZERO else math.ulp(0)
        number = isinstance(value, float | int) and not isinstance(value, bool)
        if not number or not least <= value < sys.float_info.max:
            wanted = "a number, 0 or more" if key in MAY_BE_ZERO else "a number above 0"
            raise ValueError(f"{name}, {key}: got {value!r}, expected {wanted}")
    return Costs(**{**found, "tflops_per_sm": {n: float(rates[str(n)]) for n in sorted(rows)}})
