"""The maps by which pipelines fetch boxes of the cache: what a stand-in driver is asked for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fake_driver import DecodeParams, Done, params_of
from mla import _mla

VARIANTS = [v for v in _mla.variants() if v["targets"] == "hopper"]
# One for each pair of dims: the maps depend on nothing else of a row.
ROWS = list({(v["d_qk"], v["d_v"]): v for v in VARIANTS}.values())
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])

LATENT, ROPE = 1 << 40, 3 << 40
PAGES = 1000
TYPES = {"bfloat16": 9, "float16": 6}  # of CUtensorMapDataType
# No interleave, swizzle of 128 bytes, L2 promotion to 128 bytes, zeros outside: of the enums.
MODES = [0, 3, 2, 0]


def packed(row: dict[str, Any], page_size: int) -> dict[str, int]:
    """One tensor [PAGES, page_size, d_qk]."""
    token = row["d_qk"]
    return {
        "latent": LATENT,
        "rope": LATENT + 2 * row["d_v"],
        "latent_page": page_size * token,
        "latent_token": token,
        "rope_page": page_size * token,
        "rope_token": token,
        "num_pages": PAGES,
        "page_size": page_size,
    }


def split(row: dict[str, Any], page_size: int) -> dict[str, int]:
    """Two tensors, the second of which has room between its rows and between its pages."""
    return {
        "latent": LATENT,
        "rope": ROPE,
        "latent_page": page_size * row["d_v"],
        "latent_token": row["d_v"],
        "rope_page": (page_size + 3) * 128,
        "rope_token": 128,
        "num_pages": PAGES,
        "page_size": page_size,
    }


def script(row: dict[str, Any], *caches: dict[str, int], dtype: str = "bfloat16") -> str:
    """Decodes with one cache after the other."""
    return f"""
for cache in {caches!r}:
    p = _mla.DecodeParams()
    p.h_q, p.num_workers, p.o_partial = 16, 7, 4096
    for name, value in cache.items():
        setattr(p, name, value)
    _mla.launch_decode({row["name"]!r}, {dtype!r}, p, False, 0, 0)
"""


def encoded(done: Done) -> list[dict[str, Any]]:
    return done.named("cuTensorMapEncodeTiled")


def launched(done: Done) -> list[DecodeParams]:
    """The parameters of the decode kernels. A combine kernel follows each."""
    return [params_of(launch) for launch in done.named("launch")[::2]]


def maps(p: DecodeParams) -> tuple[int, int]:
    """The numbers of the encodings that the parameters hold; 0 for none."""
    numbers = []
    for field in (p.latent_map, p.rope_map):
        assert len(set(field.words)) == 1
        numbers.append(field.words[0])
    return numbers[0], numbers[1]


def test_the_parameters_align_their_maps() -> None:
    for name in ("latent_map", "rope_map"):
        assert getattr(DecodeParams, name).offset % 64 == 0
        assert getattr(DecodeParams, name).size == 128


@each_row
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", [packed, split])
def test_what_is_encoded(run: Any, row: dict[str, Any], dtype: str, layout: Any) -> None:
    cache = layout(row, 64)
    done = run(script(row, cache, dtype=dtype))
    (p,) = launched(done)
    latent, *rope = encoded(done)
    assert p.box_rows == 64
    assert maps(p) == (latent["map"], rope[0]["map"] if rope else 0)
    assert bool(rope) == (row["d_qk"] > row["d_v"])
    wanted = [("latent", latent, row["d_v"])]
    wanted += [("rope", found, row["d_qk"] - row["d_v"]) for found in rope]
    for name, found, columns in wanted:
        assert found["type"] == TYPES[dtype]
        assert found["address"] == cache[name]
        assert found["dims"] == [columns, 64, PAGES]
        assert found["strides"] == [2 * cache[f"{name}_token"], 2 * cache[f"{name}_page"]]
        assert found["box"] == [64, 64, 1]
        assert found["steps"] == [1, 1, 1]
        assert found["modes"] == MODES


PAGE_SIZES = {  # by rows of a box
    0: (1, 2, 8, 24, 100, 2**31 - 1),
    16: (16, 48),
    32: (32, 96, 480),
    64: (64, 128, 1 << 20),
}


@pytest.mark.parametrize(
    ("box_rows", "page_size"), [(rows, size) for rows in PAGE_SIZES for size in PAGE_SIZES[rows]]
)
def test_boxes_divide_pages(run: Any, box_rows: int, page_size: int) -> None:
    done = run(script(ROWS[0], packed(ROWS[0], page_size)))
    (p,) = launched(done)
    assert p.box_rows == box_rows
    assert [found["box"] for found in encoded(done)] == [[64, box_rows, 1]] * (2 if box_rows else 0)
    assert all(found["dims"][1:] == [page_size, PAGES] for found in encoded(done))


@each_row
def test_each_map_is_encoded_once(run: Any, row: dict[str, Any]) -> None:
    """Three layers, five steps, from four threads; the other dtype has maps of its own."""
    layers = [packed(row, 64) | {"latent": LATENT + i << 20, "rope": ROPE + i} for i in (0, 16, 32)]
    work = script(row, *layers * 5) + script(row, *layers, dtype="float16")
    threads = f"""
import threading
def work():
{"".join(f"    {line}" + chr(10) for line in work.splitlines())}
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    done = run(threads)
    parts = 2 if row["d_qk"] > row["d_v"] else 1
    assert len(encoded(done)) == len(layers) * parts * 2
    by_address: dict[tuple[int, str], set[tuple[int, int]]] = {}
    for call in done.named("launch")[::2]:
        p = params_of(call)
        dtype = "bf16" if "_bf16" in call["kernel"] else "fp16"
        by_address.setdefault((p.latent, dtype), set()).add(maps(p))
    assert len(by_address) == 2 * len(layers)
    assert all(len(found) == 1 for found in by_address.values())
    assert len(set.union(*by_address.values())) == 2 * len(layers)


@pytest.mark.parametrize(
    "change",
    [
        {"latent_token": 640},
        {"latent_page": 1 << 20},
        {"num_pages": PAGES + 1},
        {"page_size": 128},
        {"latent": LATENT + 16},
    ],
    ids=str,
)
def test_another_cache_has_another_map(run: Any, change: dict[str, int]) -> None:
    row = ROWS[0]
    before = packed(row, 64)
    done = run(script(row, before, before | change, before))
    first, other, again = launched(done)
    assert maps(first)[0] == maps(again)[0] != maps(other)[0]


def test_what_is_kept_is_bounded(run: Any) -> None:
    """The maps of caches that are no more go some day; those in use are encoded again."""
    row, caches = ROWS[0], 2000
    work = script(row, packed(row, 64)).replace("_mla.launch", "    _mla.launch")
    shift = f"""    for i in [*range({caches}), {caches - 1}, 0]:
        p.latent = {LATENT} + 4096 * i
"""
    done = run(work.replace("        _mla.launch", shift + "        _mla.launch"))
    times = Counter(found["address"] for found in encoded(done))
    assert times[LATENT] == 2
    assert times[LATENT + 4096 * (caches - 1)] == 1
    assert len(launched(done)) == caches + 2


REFUSED = {
    "pages that start between 16 bytes": {"latent_page": 64 * 576 + 4},
    "rope rows that start between 16 bytes": {"rope_token": 577},
    "pages too far apart": {"rope_page": 1 << 39},
    "negative strides": {"latent_page": -64 * 576},
    "no pages": {"num_pages": 0},
    "an odd address": {"rope": LATENT + 2 * 512 + 8},
}


@pytest.mark.parametrize("what", REFUSED)
def test_rows_are_copied_where_there_is_no_map(run: Any, what: str) -> None:
    row = ROWS[0]
    cache = packed(row, 64)
    done = run(script(row, cache | REFUSED[what], cache, cache | REFUSED[what]))
    assert [p.box_rows for p in launched(done)] == [0, 64, 0]


@pytest.mark.parametrize(
    "env",
    [{"FAKE_CUDA_FAIL": "cuTensorMapEncodeTiled=1"}, {"FAKE_CUDA_LACKS": "cuTensorMapEncodeTiled"}],
    ids=["refuses", "lacks the call"],
)
def test_a_driver_without_maps(run: Any, env: dict[str, str]) -> None:
    done = run(script(ROWS[0], packed(ROWS[0], 64), packed(ROWS[0], 64)), **env)
    assert [p.box_rows for p in launched(done)] == [0, 0]


def test_other_pipelines_ask_for_no_maps(run: Any) -> None:
    others = {v["pipeline"]: v for v in _mla.variants() if v["targets"] not in ("hopper", "host")}
    for row in others.values():
        done = run(script(row, packed(row, 64)))
        (p,) = launched(done)
        assert (p.box_rows, maps(p)) == (0, (0, 0))
        assert encoded(done) == []
