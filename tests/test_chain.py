"""The launches of a call as one graph: what a stand-in driver is asked for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from fake_driver import FILL, SET, DecodeParams
from mla import _mla

NAME = next(v["name"] for v in _mla.variants() if v["pipeline"] == "sm90_3wg")
# A call on a stream, with a scale of its own.
CALL = f"""{FILL}
def call(stream, scale=1.0, device=0, plans=True):
    p.scale_log2 = scale
    _mla.launch_decode({NAME!r}, "bfloat16", p, plans, device, stream)
"""


# As of a model: a call for each layer, in every step. Decode and its combine.
STEPS = f"""{CALL}
def step(layers, stream=5):
    for layer in layers: call(stream, float(layer), plans=False)
"""
MOST_OWN = 256  # graphs beyond the first of some kernels on a stream
STALE = 1024  # calls


def graphs_of(launches: list[dict[str, Any]]) -> list[int]:
    return [launch["graph"] for launch in launches]


def scales_of(launches: list[dict[str, Any]]) -> list[float]:
    """What the kernels would compute with, of decode and combine."""
    return [
        DecodeParams.from_buffer_copy(bytes.fromhex(launch["parameters"][0])).scale_log2
        for launch in launches
    ]


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
    """What did not change is not set again: here the planner's do not."""
    scales = [1.0, 2.0, 2.0, 3.0]
    done = run(f"{CALL}\nfor scale in {scales}: call(5, scale)")
    launches = done.named("launch")
    for scale, start in zip(scales, range(0, len(launches), 3), strict=True):
        assert scales_of(launches[start + 1 : start + 3]) == [scale] * 2
    changes = sum(a != b for a, b in pairwise(scales))
    kernels = [c["kernel"] for c in done.named(SET)]
    assert [kernel.split("_")[1] for kernel in kernels] == ["sm90", "combine"] * changes


def test_grids_change_with_sizes(run: Any) -> None:
    script = f"""{CALL}
for requests in (1, 2):
    p.num_requests, p.total_q, p.h_q, p.num_workers = requests, requests, 16, 132
    call(5)
"""
    launches = run(script).named("launch")
    grids = [launch["grid"] for launch in launches[2::3]]
    assert grids[0] < grids[1]
    assert set(graphs_of(launches)) == {1}


@pytest.mark.parametrize("layers", [1, 2, 61, MOST_OWN])
def test_layers_have_graphs_of_their_own(run: Any, layers: int) -> None:
    """From the second step on. They launch what they did, and nothing is set."""
    steps = 4
    done = run(f"{STEPS}\nfor _ in range({steps}): step(range({layers}))")
    launches = done.named("launch")
    assert scales_of(launches) == [float(i) for i in range(layers) for _ in range(2)] * steps
    assert done.sets(2 * layers) == [2 * (layers - 1)] + [0] * (steps - 1)
    graphs = graphs_of(launches)[::2]
    assert graphs[:layers] == [1] * layers
    assert len(set(graphs[layers : 2 * layers])) == layers
    assert graphs[2 * layers :] == graphs[layers : 2 * layers] * 2


def test_equal_layers_on_two_streams_do_not_share_a_graph(run: Any) -> None:
    script = f"""{STEPS}
for _ in range(4):
    for stream in (5, 6): step(range(10), stream)
"""
    done = run(script)
    launches = done.named("launch")
    assert scales_of(launches) == [float(i) for i in range(10) for _ in range(2)] * 8
    assert done.sets(40)[1:] == [0, 0, 0]
    streams = [{c["graph"] for c in launches if c["stream"] == stream} for stream in (5, 6)]
    assert [len(graphs) for graphs in streams] == [10, 10]
    assert not streams[0] & streams[1]


def test_equal_parameters_of_other_kernels_do_not_share_a_graph(run: Any) -> None:
    script = f"""{CALL}
for _ in range(3):
    for dtype in ("bfloat16", "float16"): _mla.launch_decode({NAME!r}, dtype, p, False, 0, 5)
"""
    launches = run(script).named("launch")
    kinds = [launch["kernel"].split("_")[-1] for launch in launches[::2]]
    assert kinds == ["bf16", "fp16"] * 3
    assert graphs_of(launches) == [1, 1, 2, 2] * 3


def test_launches_that_never_come_again_share_a_graph(run: Any) -> None:
    calls = 600
    done = run(f"{STEPS}\nstep(range({calls}))")
    launches = done.named("launch")
    assert scales_of(launches) == [float(i) for i in range(calls) for _ in range(2)]
    assert set(graphs_of(launches)) == {1}
    assert done.sets(2) == [0] + [2] * (calls - 1)


def test_a_new_call_among_layers_takes_no_graph_of_theirs(run: Any) -> None:
    """It takes the first, so that the layer that had this one gets one of its own."""
    script = f"""{STEPS}
for i in range(6):
    step(range(61))
    call(5, 1000.0 + i, plans=False)
"""
    done = run(script)
    sets = done.sets(2 * 62)
    assert sets == [2 * 61] + [2] * 5
    new = [call["graph"] for call in done.named("launch")[2 * 61 :: 2 * 62]]
    assert new == [1] * 6


def test_more_layers_than_graphs(run: Any) -> None:
    """Those that have one keep it; the others share the first."""
    layers, steps = MOST_OWN + 45, 5
    done = run(f"{STEPS}\nfor _ in range({steps}): step(range({layers}))")
    launches = done.named("launch")
    assert scales_of(launches) == [float(i) for i in range(layers) for _ in range(2)] * steps
    assert len(set(graphs_of(launches))) == 1 + MOST_OWN
    assert done.sets(2 * layers)[2:] == [2 * (layers - MOST_OWN)] * (steps - 2)


def test_graphs_go_to_layers_that_are_in_use(run: Any) -> None:
    """Others come: when those before were not for long, their graphs are given away."""
    others, steps = 61, 2 * (STALE + MOST_OWN) // 61
    script = f"""{STEPS}
for _ in range(2): step(range({1 + MOST_OWN}))
for _ in range({steps}): step(range(1000, {1000 + others}))
"""
    done = run(script)
    launches = done.named("launch")[4 * (1 + MOST_OWN) :]
    assert scales_of(launches) == [float(1000 + i) for i in range(others) for _ in range(2)] * steps
    assert len({launch["graph"] for launch in done.named("launch")}) == 1 + MOST_OWN
    assert not any(done.sets(2)[-others:])


def test_parameters_that_were_not_set_are_set_at_the_next_call(run: Any) -> None:
    """Of decode they are those of the failed call then, of its combine those of the one before."""
    script = f"""{STEPS}
for scale in (1.0, 2.0, 1.0, 2.0, 2.0):
    try: call(5, scale, plans=False)
    except _mla.CudaError as error: print(scale, error.api, error.code)
"""
    done = run(script, FAKE_CUDA_FAIL_SET="2")
    assert done.printed == f"2.0 {SET} 719\n"
    assert scales_of(done.named("launch")) == [1.0] * 4 + [2.0] * 4


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


def test_streams_with_graphs_are_bounded(run: Any) -> None:
    """Streams beyond have their launches one by one."""
    script = f"{CALL}\nfor _ in range(2):\n    for stream in range(100, 230): call(stream)"
    launches = run(script).named("launch")
    once = [graph for i in range(130) for graph in [i + 1 if i < 128 else 0] * 3]
    assert graphs_of(launches) == 2 * once


def test_a_driver_that_makes_no_second_graph(run: Any) -> None:
    done = run(f"{STEPS}\nfor _ in range(3): step(range(4))", FAKE_CUDA_MOST_GRAPHS="1")
    launches = done.named("launch")
    assert scales_of(launches) == [float(i) for i in range(4) for _ in range(2)] * 3
    assert set(graphs_of(launches)) == {1}
    assert len(done.named("cuGraphInstantiateWithFlags")) == 2, "it is asked no more"


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
