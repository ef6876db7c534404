"""What the extension asks of the driver: a stand-in for it (fake_cuda.cpp) tells, without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from fake_driver import (
    ATTRIBUTES,
    COMBINED,
    FILL,
    LENGTHS,
    WORKERS,
    DecodeParams,
    Lengths,
    filled_params,
    params_of,
    values_of,
)
from mla import _mla

GPU_VARIANTS = [v for v in _mla.variants() if v["pipeline"] != "cpu"]
NAMES = [v["name"] for v in GPU_VARIANTS]


def test_params_are_zero_at_first_and_keep_what_they_are_given() -> None:
    assert ctypes.sizeof(DecodeParams) == _mla.PARAMS_BYTES
    bound = [n for n in dir(_mla.DecodeParams) if not n.startswith("_")]
    assert sorted(ATTRIBUTES) == sorted(bound)
    fresh = _mla.DecodeParams()
    assert {getattr(fresh, name) for name in ATTRIBUTES} == {0}
    params = filled_params()
    assert len({getattr(params, name) for name in ATTRIBUTES}) == len(ATTRIBUTES)
    params.latent = 2**64 - 16
    params.latent_page = -(2**40)
    assert (params.latent, params.latent_page) == (2**64 - 16, -(2**40))


def test_import_and_build_questions_leave_the_driver_alone(run: Any) -> None:
    done = run("_mla.variants(), _mla.images(), _mla.build_info(), _mla.DecodeParams()")
    assert done.calls == []


@pytest.mark.parametrize("variant", GPU_VARIANTS, ids=NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decode_is_the_kernel_and_its_combine(
    run: Any, variant: dict[str, Any], dtype: str
) -> None:
    name = variant["name"]
    done = run(f"{FILL}\n_mla.launch_decode({name!r}, {dtype!r}, p, False, 1, 0xabc)")
    decode, combine = done.named("launch")
    short = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    assert decode["kernel"] == f"mla_{name}_{short}"
    assert combine["kernel"] == f"mla_combine_{short}_v{variant['d_v']}_many"
    assert (decode["grid"], decode["block"]) == (WORKERS, 32 * variant["warps"])
    assert (combine["grid"], combine["block"], combine["smem"]) == (4 * WORKERS, 256, 0)
    assert {(call["stream"], call["device"]) for call in (decode, combine)} == {(0xABC, 1)}

    wanted = values_of(filled_params(), ATTRIBUTES)  # type: ignore[arg-type]
    assert values_of(params_of(decode), ATTRIBUTES) == wanted
    assert values_of(params_of(combine), COMBINED) == {name: wanted[name] for name in COMBINED}
    shape = (ctypes.c_int32 * 3).from_buffer_copy(bytes.fromhex(combine["parameters"][1]))
    assert list(shape) == [variant["block_rows"], variant["block_n"], variant["merges_pairs"]]
    assert (decode["beside"], combine["beside"]) == (False, True)


def test_nothing_is_combined_where_nothing_can_be_split(run: Any) -> None:
    script = f"""{FILL}
for p.o_partial in (0, 4096):
    _mla.launch_decode({NAMES[0]!r}, 'bfloat16', p, False, 0, 0)
"""
    kinds = [call["kernel"].split("_")[1] for call in run(script).named("launch")]
    assert kinds == ["sm80", "sm80", "combine"]


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_kernels_that_wait_start_beside_the_one_before(run: Any, sm: int) -> None:
    """The planner after all that was queued before it, so that who waits for it waits for that."""
    script = f"""{FILL}
for name in {NAMES!r}:
    for p.batch_invariant in (0, 1):
        _mla.launch_decode(name, 'bfloat16', p, True, 0, 0)
"""
    launches = run(script, FAKE_CUDA_SM=str(sm)).named("launch")
    assert len(launches) == 2 * 3 * len(NAMES)
    for plan, decode, combine in zip(launches[::3], launches[1::3], launches[2::3], strict=True):
        assert plan["kernel"].startswith("mla_plan")
        assert not plan["beside"]
        waits = "_sm90_" in decode["kernel"]  # the others hold no instruction to do so
        assert decode["beside"] == (waits and sm >= 90), decode["kernel"]
        assert combine["beside"] == (sm >= 90)


@pytest.mark.parametrize(
    ("requests", "s_q", "row_tiles"), [(0, 1, 0), (3, 1, 6), (3, 2, 9), (3, None, 6 + 3)]
)
def test_combine_has_no_more_ctas_than_tasks(
    requests: int, s_q: int | None, row_tiles: int, run: Any
) -> None:
    """Of 16 rows and 16 columns. 17 heads; ragged: five tokens in all. So few get the one form."""
    name = next(v["name"] for v in GPU_VARIANTS if v["d_v"] == 256)
    given = {"num_requests": requests, "h_q": 17, "total_q": 5, "num_workers": 1000}
    if s_q is not None:
        given |= {"s_q": s_q, "cu_seqlens_q": 0}
    fill = "".join(f"p.{name} = {value}\n" for name, value in given.items())
    done = run(f"{FILL}\n{fill}_mla.launch_decode({name!r}, 'float16', p, False, 0, 0)")
    combine = done.named("launch")[1]
    assert combine["grid"] == max(16 * row_tiles, 1)
    assert combine["kernel"].endswith("_few")


@pytest.mark.parametrize(
    ("row_tiles", "ctas", "tasks"), [(7, 2 * WORKERS, "few"), (8, 4 * WORKERS, "many")]
)
def test_combine_has_two_ctas_for_a_worker_if_all_tasks_have_a_warp(
    row_tiles: int, ctas: int, tasks: str, run: Any
) -> None:
    """7 workers, 14 CTAs, 112 warps; 16 tasks in each 16 rows."""
    name = next(v["name"] for v in GPU_VARIANTS if v["d_v"] == 256)
    fill = f"p.num_requests, p.h_q, p.s_q, p.cu_seqlens_q = {row_tiles}, 16, 1, 0"
    done = run(f"{FILL}\n{fill}\n_mla.launch_decode({name!r}, 'bfloat16', p, False, 0, 0)")
    combine = done.named("launch")[1]
    assert combine["kernel"] == f"mla_combine_bf16_v256_{tasks}"
    assert combine["grid"] == ctas


def test_decode_divides_by_multiplication(run: Any) -> None:
    divisors = [1, 2, 3, 7, 16, 40, 64, 96, 127, 128, 1000, 2**20 - 1, 2**20, 2**30 + 1, 2**31 - 1]
    script = f"""{FILL}
for divisor in {divisors}:
    p.h_q = p.page_size = divisor
    _mla.launch_decode({NAMES[0]!r}, 'float16', p, False, 0, 0)
p.page_size = 0
try:
    _mla.launch_decode({NAMES[0]!r}, 'float16', p, False, 0, 0)
except ValueError as error:
    print(error)
"""
    done = run(script)
    assert done.printed == "page_size and h_q must be positive\n"
    launches = done.named("launch")
    assert len(launches) == 2 * len(divisors)
    for decode, combine, divisor in zip(launches[::2], launches[1::2], divisors, strict=True):
        edges = {k * divisor + d for k in (0, 1, 2, (2**31 - 2) // divisor) for d in (-1, 0, 1)}
        numbers = {n for n in edges | {2**31 - 1} if 0 <= n < 2**31}
        params = params_of(decode)
        for by in (params.by_page_size, params.by_h_q, params_of(combine).by_h_q):
            assert by.multiplier * (2**31 - 1) < 2**64, "the kernels multiply in 64 bits"
            assert [by.divide(n) for n in numbers] == [n // divisor for n in numbers]


@pytest.mark.parametrize("variant", GPU_VARIANTS, ids=NAMES)
@pytest.mark.parametrize("batch_invariant", [0, 1])
def test_plan_is_one_launch(run: Any, variant: dict[str, Any], batch_invariant: int) -> None:
    mode = f"p.batch_invariant = {batch_invariant}"
    done = run(f"{FILL}\n{mode}\n_mla.launch_plan({variant['name']!r}, p, 0, 5)")
    (plan,) = done.named("launch")
    kernel = "mla_plan_parts_large" if batch_invariant else "mla_plan_large_ragged"
    assert (plan["kernel"], plan["grid"], plan["block"]) == (kernel, 1, 512)
    assert (plan["smem"], plan["stream"], plan["device"]) == (0, 5, 0)
    lengths, shape, workers, header, *limits = (bytes.fromhex(p) for p in plan["parameters"])
    params = filled_params()
    got = values_of(Lengths.from_buffer_copy(lengths), LENGTHS)
    assert got == values_of(params, LENGTHS)  # type: ignore[arg-type]
    tile = variant["block_rows"], variant["block_n"], variant["merges_pairs"]
    assert shape == b"".join(int(size).to_bytes(4, "little") for size in tile)
    assert int.from_bytes(workers, "little") == WORKERS
    assert int.from_bytes(header, "little") == params.plan
    assert len(limits) == batch_invariant


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("requests", "h_q", "max_len", "size"),
    [
        (128, 128, 2**17, "few"),
        (129, 128, 2**17, "small"),
        (4096, 16, 2**17, "small"),
        (4097, 16, 2**17, "large"),  # more than are searched in shared memory
        (4096, 128, 2**17, "large"),  # too many units
    ],
)
def test_planners_of_small_batches_plan_small_batches(
    run: Any, requests: int, h_q: int, max_len: int, size: str, ragged: bool
) -> None:
    script = f"""{FILL}
p.num_requests, p.s_q, p.total_q, p.h_q, p.max_len = {requests}, 1, 1, {h_q}, {max_len}
p.cu_seqlens_q, p.num_workers = {int(ragged)}, 132
for p.batch_invariant in (0, 1):
    _mla.launch_plan("sm90_3wg_r64_n64_s2_d576", p, 0, 0)
"""
    plan, parts = run(script).named("launch")
    assert plan["kernel"] == f"mla_plan_{size}" + "_ragged" * ragged
    assert plan["block"] == (384 if size == "few" else 512)
    # Which keeps more of each request in shared memory.
    is_small = size != "large" and requests <= 2048
    assert parts["kernel"] == f"mla_plan_parts_{'small' if is_small else 'large'}"


@pytest.mark.parametrize(
    ("per_sm", "per_block"), [(164 << 10, 163 << 10), (100 << 10, 99 << 10), (228 << 10, 227 << 10)]
)
def test_one_block_fits_on_an_sm(run: Any, per_sm: int, per_block: int) -> None:
    for variant in GPU_VARIANTS:
        if variant["smem_bytes"] > per_block:
            continue
        script = f"{FILL}\n_mla.launch_decode({variant['name']!r}, 'float16', p, False, 0, 0)"
        done = run(script, FAKE_CUDA_SMEM=f"{per_sm},{per_block}")
        smem = done.named("launch")[0]["smem"]
        assert variant["smem_bytes"] <= smem <= per_block
        assert 2 * smem > per_sm, "a second block fits beside it"


def test_a_variant_that_does_not_fit_is_an_error(run: Any) -> None:
    largest = max(GPU_VARIANTS, key=lambda v: v["smem_bytes"])
    per_block = largest["smem_bytes"] - 1
    script = f"""{FILL}
try:
    _mla.launch_decode({largest["name"]!r}, 'float16', p, False, 0, 0)
except _mla.CudaError as error:
    print(error.api)
"""
    done = run(script, FAKE_CUDA_SMEM=f"{per_block},{per_block}")
    assert done.printed == "cuKernelSetAttribute\n"
    assert not done.named("launch")


def test_each_thing_is_done_once(run: Any) -> None:
    script = f"""{FILL}
import threading
def work():
    for _ in range(3):
        _mla.launch_plan({NAMES[0]!r}, p, 0, 0)
        for dtype in ("bfloat16", "float16"):
            for device in (0, 1):
                _mla.launch_decode({NAMES[0]!r}, dtype, p, False, device, 0)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    done = run(script)
    assert len(done.named("launch")) == 4 * 3 * (1 + 2 * 2 * 2)
    loaded = done.named("cuLibraryLoadData")
    assert len({load["image"] for load in loaded}) == len(loaded) == 3  # plan, combine, the variant
    assert all(load["preserved"] for load in loaded)
    assert sorted(c["device"] for c in done.named("cuDevicePrimaryCtxRetain")) == [0, 1]
    set_for = [(c["kernel"], c["device"]) for c in done.named("cuKernelSetAttribute")]
    # The planner; decode and both forms of combine in two dtypes on two devices.
    assert len(set_for) == len(set(set_for)) == 1 + 3 * 2 * 2
    carveouts = [c["carveout"] for c in done.named("cuKernelSetAttribute") if "carveout" in c]
    assert carveouts == [100] * 9
    assert len(done.named("cuInit")) == 1


def test_the_current_context_is_left_as_it_was(run: Any) -> None:
    script = f"""{FILL}
_mla.launch_decode({NAMES[0]!r}, 'float16', p, False, 1, 0)
try:
    _mla.launch_decode({NAMES[0]!r}, 'float16', p, False, 2, 0)
except _mla.CudaError as error:
    print(error.api)
"""
    done = run(script)
    stack = [c for c in done.calls if c["call"].startswith("cuCtx")]
    assert [c["call"] for c in stack] == ["cuCtxPushCurrent", "cuCtxPopCurrent"]
    assert {c["device"] for c in stack} == {1}
    assert done.printed == "cuDeviceGet\n"


def test_a_context_that_is_current_is_not_pushed(run: Any) -> None:
    script = f"""{FILL}
import ctypes
driver = ctypes.CDLL("libcuda.so.1")
def call(name, argument):
    address = ctypes.c_void_p()
    driver.cuGetProcAddress_v2(name, ctypes.byref(address), 12000, ctypes.c_uint64(0), None)
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(address.value)(argument, 1)
context = ctypes.c_void_p()
call(b"cuDevicePrimaryCtxRetain", ctypes.byref(context))
call(b"cuCtxPushCurrent", context)
_mla.launch_decode({NAMES[0]!r}, 'float16', p, False, 1, 0)
"""
    done = run(script)
    assert len(done.named("launch")) == 2
    changes = [c["call"] for c in done.calls if c["call"].startswith("cuCtx")]
    assert changes == ["cuCtxPushCurrent"], "that of the script"


@pytest.mark.parametrize("variant", GPU_VARIANTS, ids=NAMES)
def test_preload_brings_in_all_that_a_call_launches(run: Any, variant: dict[str, Any]) -> None:
    name = variant["name"]
    done = run(f"_mla.preload(1, {name!r})")
    assert not done.named("launch")
    got = [(c["kernel"], c["device"]) for c in done.named("cuKernelGetFunction")]
    combine = f"mla_combine_%s_v{variant['d_v']}_"
    entries = (f"mla_{name}_%s", f"{combine}few", f"{combine}many")
    names = [n % t for n in entries for t in ("bf16", "fp16")]
    names += [f"mla_plan_{size}{q}" for size in ("few", "small", "large") for q in ("", "_ragged")]
    names += [f"mla_plan_parts_{size}" for size in ("small", "large")]
    assert sorted(got) == sorted((n, 1) for n in names)


def test_a_failed_launch_says_what_failed(run: Any) -> None:
    script = f"""{FILL}
try:
    _mla.launch_decode({NAMES[0]!r}, 'float16', p, False, 0, 0)
except RuntimeError as error:
    print(type(error).__name__, error, error.api, error.code, error.text, sep="|")
"""
    done = run(script, FAKE_CUDA_FAIL="cuLaunchKernelEx=701", FAKE_CUDA_CAPTURING="1")
    text = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701): what it means"
    wanted = f"CudaError|cuLaunchKernelEx failed: {text}|cuLaunchKernelEx|701|{text}\n"
    assert done.printed == wanted
    assert done.named("cuCtxPopCurrent"), "the context is left as it was, in spite of the error"


PROBLEM = f"""{FILL}
print(_mla.driver_version(), _mla.driver_problem())
try:
    _mla.launch_plan({NAMES[0]!r}, p, 0, 0)
except _mla.CudaError as error:
    assert str(error) == error.text == _mla.driver_problem() and error.code == -1
else:
    assert not _mla.driver_problem()
"""


def test_a_good_driver_has_no_problem(run: Any) -> None:
    newest = "99000"
    assert run(PROBLEM, FAKE_CUDA_VERSION=newest).printed == f"{newest} \n"


def test_an_old_driver_is_told_which_one_is_needed(run: Any) -> None:
    done = run(PROBLEM, FAKE_CUDA_VERSION="11080")
    assert done.printed.startswith("11080 mla needs an NVIDIA driver >= ")
    assert f">= {_mla.build_info()['min_driver']} " in done.printed
    assert "supports CUDA 11.8 at most" in done.printed
    assert done.calls == []


def test_no_driver_is_told_which_one_is_needed(run: Any, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("")  # hides a driver that this machine may have
    done = run(PROBLEM, driver=tmp_path)
    assert done.printed.startswith("0 mla needs an NVIDIA driver >= ")
    assert "libcuda.so.1" in done.printed


def test_a_driver_without_a_device_says_so(run: Any) -> None:
    done = run(PROBLEM, FAKE_CUDA_FAIL="cuInit=100", FAKE_CUDA_VERSION="13000")
    assert done.printed == "13000 cuInit failed: unknown error (100): what it means\n"


def test_unknown_names_are_errors() -> None:
    params = _mla.DecodeParams()
    for variant in ("cpu", "sm80", ""):
        with pytest.raises(IndexError, match="no GPU variant has the name"):
            _mla.launch_decode(variant, "float16", params, False, 0, 0)
    with pytest.raises(IndexError, match="no kernel computes in float32"):
        _mla.launch_decode(NAMES[0], "float32", params, False, 0, 0)
    with pytest.raises(IndexError, match="no image has the name"):
        _mla.image("sm80")


@pytest.mark.parametrize("variant", GPU_VARIANTS, ids=NAMES)
def test_sizes(variant: dict[str, Any]) -> None:
    params = _mla.DecodeParams()
    params.num_workers = 3
    assert _mla.partial_slots(variant["name"], params) == 2 * 3 + 1


def test_a_plan_has_room_for_every_piece() -> None:
    params = _mla.DecodeParams()
    params.num_requests, params.s_q, params.h_q, params.num_workers = 5, 2, 40, 7
    variant = GPU_VARIANTS[0]
    header, worker, split, piece, request = 48, 64, 32, 32, 8 + 4
    row_blocks = -(-2 * 40 // variant["block_rows"])
    fixed = header + 7 * (worker + split) + 6 * request
    assert _mla.plan_bytes(variant["name"], params) == fixed + (5 * row_blocks + 7) * piece
    params.cu_seqlens_q, params.total_q = (
        16,
        9,
    )  # ragged: requests can waste row blocks
    row_blocks = -(-9 * 40 // variant["block_rows"]) + 5
    assert _mla.plan_bytes(variant["name"], params) == fixed + (row_blocks + 7) * piece
