"""The launches of a call as one graph: what a stand-in driver is asked for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from fake_driver import FILL, SET, params_of
from mla import _mla

NAME = next(v["name"] for v in _mla.variants() if v["pipeline"] == "sm90_3wg")
# A call on a stream, with a scale of its own.
CALL = f"""{FILL}
def call(stream, scale=1.0, device=0, plans=True):
    p.scale_log2 = scale
    _mla.launch_decode({NAME!r}, "bfloat16", p, plans, device, stream)
"""


def graphs_of(launches: list[dict[str, Any]]) -> list[int]:
    return [launch["graph"] for launch in launches]


def test_a_graph_for_each_stream_device_and_set_of_kernels(run: Any) -> None:
    script = f"""{CALL}
for _ in range(2):
    call(5)
    call(6)
    call(5, device=1)
    call(5, plans=False)
"""
    launches = run(script).named("launch")
    kinds = [launch["kernel"].split("_")[1] for launch in launches]
    assert kinds == 2 * (3 * ["plan", "sm90", "combine"] + ["sm90", "combine"])
    graphs = graphs_of(launches)
    once = [1] * 3 + [2] * 3 + [3] * 3 + [4] * 2
    assert graphs == 2 * once
    assert [launch["stream"] for launch in launches] == 2 * ([5] * 3 + [6] * 3 + [5] * 5)
    assert [launch["device"] for launch in launches] == 2 * ([0] * 6 + [1] * 3 + [0] * 2)


def test_each_launch_has_the_parameters_of_its_call(run: Any) -> None:
    """What did not change is not set again: here the planner's and the combine's do not."""
    scales = [1.0, 2.0, 2.0, 3.0]
    done = run(f"{CALL}\nfor scale in {scales}: call(5, scale)")
    launches = done.named("launch")
    for scale, start in zip(scales, range(0, len(launches), 3), strict=True):
        assert params_of(launches[start + 1]).scale_log2 == scale
    changes = sum(a != b for a, b in pairwise(scales))
    kernels = [c["kernel"] for c in done.named(SET)]
    assert [kernel.split("_")[1] for kernel in kernels] == ["sm90"] * changes


def test_grids_change_with_sizes(run: Any) -> None:
    script = f"""{CALL}
for requests in (1, 2, 1):
    p.num_requests, p.total_q, p.h_q, p.num_workers = requests, requests, 16, 132
    call(5)
"""
    launches = run(script).named("launch")
    grids = [launch["grid"] for launch in launches[2::3]]
    assert grids[0] == grids[2] < grids[1]
    assert set(graphs_of(launches)) == {1}


def test_a_graph_has_the_priority_of_its_stream(run: Any) -> None:
    urgent = 99
    launches = run(f"{CALL}\ncall(5)\ncall({urgent})").named("launch")
    assert [launch["priority"] for launch in launches] == [0] * 3 + [-5] * 3


@pytest.mark.parametrize(
    "knobs",
    [
        {"FAKE_CUDA_CAPTURING": "1"},
        {"FAKE_CUDA_VERSION": "12020"},  # no edges between kernels that start beside each other
        {"FAKE_CUDA_FAIL": "cuGraphInstantiateWithFlags=801"},
    ],
    ids=["captured", "old driver", "refused"],
)
def test_launches_one_by_one(run: Any, knobs: dict[str, str]) -> None:
    done = run(f"{CALL}\nfor scale in (1.0, 2.0): call(5, scale)", **knobs)
    launches = done.named("launch")
    assert graphs_of(launches) == [0] * 6
    assert [launch["beside"] for launch in launches] == 2 * [False, True, True]
    assert not done.named(SET)


def test_graphs_are_bounded(run: Any) -> None:
    """Streams beyond have their launches one by one."""
    script = f"{CALL}\nfor _ in range(2):\n    for stream in range(100, 230): call(stream)"
    launches = run(script).named("launch")
    once = [graph for i in range(130) for graph in [i + 1 if i < 128 else 0] * 3]
    assert graphs_of(launches) == 2 * once


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_parameters_that_were_not_set_are_set_by_the_next_call(run: Any, failing: int) -> None:
    """Of a node behind one that was, or of the one itself."""
    script = f"""{CALL}
for address in (4096, 8192, 8192, 4096):
    p.plan = address  # which all three read
    try: call(5)
    except _mla.CudaError as error: print(address, error.api, error.code)
"""
    done = run(script, FAKE_CUDA_FAIL_SET=str(failing))
    assert done.printed == f"8192 {SET} 719\n"
    launches = done.named("launch")
    plans = [int.from_bytes(bytes.fromhex(c["parameters"][3]), "little") for c in launches[::3]]
    assert plans == [4096, 8192, 4096]
    assert [params_of(c).plan for c in launches[1::3]] == plans
    assert [params_of(c).plan for c in launches[2::3]] == plans


@pytest.mark.parametrize("failing", [SET, "cuGraphLaunch"])
def test_a_failed_graph_says_what_failed(run: Any, failing: str) -> None:
    script = f"""{CALL}
for scale in (1.0, 2.0):
    try:
        call(5, scale)
    except _mla.CudaError as error:
        print(error.api, error.code)
"""
    printed = run(script, FAKE_CUDA_FAIL=f"{failing}=719").printed.split("\n")
    assert set(printed[:-1]) == {f"{failing} 719"}
