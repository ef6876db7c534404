"""Prepared calls as the driver gets them: a stand-in for it tells, without a GPU."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from fake_driver import AS_H200, COMBINED, SET, params_of, values_of

CALLS = """
def tensors():
    bf16, int32 = torch.bfloat16, torch.int32
    return {
        "q": torch.zeros(3, 2, 8, 576, dtype=bf16),
        "kv_cache": torch.zeros(10, 16, 576, dtype=bf16),
        "block_table": torch.zeros(3, 4, dtype=int32),
        "seq_lens": torch.zeros(3, dtype=int32),
        "out": torch.zeros(3, 2, 8, 512, dtype=bf16),
        "lse": torch.zeros(3, 2, 8),
    }
calls = [tensors() for _ in range(3)]
"""
PRINT = """
print(json.dumps([{name: tensor.data_ptr() for name, tensor in call.items()} for call in calls]))
"""


def test_launches_have_the_addresses_of_their_call(run: Any) -> None:
    script = f"""{CALLS}
for i, call in enumerate([*calls, *calls]):
    mla.decode(**call, scale=i)
{PRINT}"""
    done = run(script, prologue=AS_H200)
    calls = json.loads(done.printed)
    launches = done.named("launch")
    assert [launch["kernel"].split("_")[1] for launch in launches] == [
        "plan",
        "sm90",
        "combine",
    ] * 6
    assert {launch["stream"] for launch in launches} == {77}
    maps = {(p["address"], p["dims"][0]): p["map"] for p in done.named("cuTensorMapEncodeTiled")}
    assert len(maps) == len(done.named("cuTensorMapEncodeTiled")) == 2 * len(calls)
    for i, launch in enumerate(launches):
        if launch["kernel"].startswith("mla_plan"):
            continue
        p, call = params_of(launch), calls[i // 3 % 3]
        for name in ("seq_lens", "out", "lse"):
            assert getattr(p, name) == call[name]
        if launch["kernel"].startswith("mla_combine"):
            continue
        for field, name in (
            ("q_nope", "q"),
            ("latent", "kv_cache"),
            ("block_table", "block_table"),
        ):
            assert getattr(p, field) == call[name]
        assert p.scale_log2 == pytest.approx(i // 3 / math.log(2))
        assert p.latent_map.words[0] == maps[call["kv_cache"], 512]
        assert p.rope_map.words[0] == maps[call["kv_cache"] + 1024, 64]


@pytest.mark.parametrize("planned", [False, True])
def test_only_the_decode_kernel_is_set_anew_for_another_layer(run: Any, planned: bool) -> None:
    """With a cache, a query and a block table of its own, but not with outputs of its own."""
    sizes = "s_q=2, h_q=8, d_qk=576, dtype=torch.bfloat16, page_size=16"
    plan = f'mla.plan(calls[0]["seq_lens"], {sizes})' if planned else None
    script = f"""{CALLS}
plan = {plan}
same = {{name: calls[0][name] for name in ("seq_lens", "out", "lse")}}
for call in calls: mla.decode(**{{**call, **same}}, scale=1.0, plan=plan)
mla.decode(**calls[2], scale=1.0, plan=plan)
{PRINT}"""
    done = run(script, prologue=AS_H200)
    launches = done.named("launch")[planned:]
    calls = json.loads(done.printed)
    kernels = 2 if planned else 3
    got = [params_of(launch) for launch in launches[kernels - 2 :: kernels]]
    assert [p.latent for p in got] == [call["kv_cache"] for call in [*calls, calls[2]]]
    set_anew = [call["kernel"].split("_")[1] for call in done.named(SET)]
    of_others = ["sm90", "combine"] if planned else ["plan", "sm90", "combine"]
    assert set_anew == ["sm90", "sm90", *of_others]


@pytest.mark.parametrize("workspace", [False, True])
def test_captured_calls_have_their_launches_one_by_one(run: Any, workspace: bool) -> None:
    given = "torch.zeros(64 << 20, dtype=torch.uint8)" if workspace else "None"
    script = f"""{CALLS}
import os
workspace = {given}
for capturing in "0101":
    os.environ["FAKE_CUDA_CAPTURING"] = capturing
    mla.decode(**calls[0], scale=1.0, workspace=workspace)
"""
    launches = run(script, prologue=AS_H200).named("launch")
    assert [launch["graph"] > 0 for launch in launches] == ([True] * 3 + [False] * 3) * 2


def test_decode_starts_beside_its_planner_and_after_anything_else(run: Any) -> None:
    script = f"""{CALLS}
plan = mla.plan(calls[0]["seq_lens"], s_q=2, h_q=8, d_qk=576, dtype=torch.bfloat16, page_size=16)
for _ in range(2):
    mla.decode(**calls[0], scale=1.0)
    mla.decode(**calls[0], scale=1.0, plan=plan)
"""
    launches = run(script, prologue=AS_H200).named("launch")
    kinds = [(launch["kernel"].split("_")[1], launch["beside"]) for launch in launches]
    planned = [("sm90", False), ("combine", True)]
    unplanned = [("plan", False), ("sm90", True), ("combine", True)]
    assert kinds == [("plan", False), *2 * (unplanned + planned)]


@pytest.mark.parametrize(("pages", "split"), [(64, False), (65, True)])
def test_batch_invariant_calls_combine_if_a_request_can_have_two_parts(
    run: Any, pages: int, split: bool
) -> None:
    """Of 1024 tokens: pages have 16."""
    script = f"""{CALLS}
call = calls[0] | {{"block_table": torch.zeros(3, {pages}, dtype=torch.int32)}}
for _ in range(2):
    mla.decode(**call, scale=1.0, batch_invariant=True)
"""
    launches = run(script, prologue=AS_H200).named("launch")
    kinds = ["plan", "sm90", "combine"] if split else ["plan", "sm90"]
    assert [launch["kernel"].split("_")[1] for launch in launches] == 2 * kinds


def test_a_captured_call_has_a_workspace_of_its_own(run: Any) -> None:
    script = f"""{CALLS}
import os
for captures in "010":
    os.environ["FAKE_CUDA_CAPTURING"] = captures
    for _ in range(2):
        mla.decode(**calls[0], scale=1.0)
print(json.dumps(_mla.workspaces()))
"""
    done = run(script, prologue=AS_H200)
    ((device, stream, size),) = json.loads(done.printed)
    assert (device, stream) == (0, 77)
    assert size > 1 << 20
    at = [params_of(x).plan for x in done.named("launch") if x["kernel"].startswith("mla_sm90")]
    assert at[0] == at[1] == at[4] == at[5]
    assert not {at[0]} & {at[2], at[3]}


def test_threads_do_not_mix_their_launches(run: Any) -> None:
    script = f"""{CALLS}
import threading
def work(i):
    for _ in range(200):
        mla.decode(**calls[i], scale=1.0)
threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
{PRINT}"""
    done = run(script, prologue=AS_H200)
    launches = done.named("launch")
    assert len(launches) == 3 * 3 * 200
    for plan, decode, combine in zip(launches[::3], launches[1::3], launches[2::3], strict=True):
        assert (plan["kernel"][:8], decode["kernel"][:8]) == ("mla_plan", "mla_sm90")
        wanted = values_of(params_of(decode), COMBINED)
        assert values_of(params_of(combine), COMBINED) == wanted


@pytest.mark.parametrize(
    ("failing", "version"), [("cuGraphLaunch", "12030"), ("cuLaunchKernelEx", "12020")]
)
def test_a_failed_launch_is_an_error_of_prepared_calls_too(
    run: Any, failing: str, version: str
) -> None:
    script = f"""{CALLS}
for _ in range(2):
    try:
        mla.decode(**calls[0], scale=1.0)
    except mla.CudaError as error:
        print(error.api, error.code)
"""
    knobs = {"FAKE_CUDA_FAIL": f"{failing}=701", "FAKE_CUDA_VERSION": version}
    done = run(script, prologue=AS_H200, **knobs)
    assert done.printed == f"{failing} 701\n" * 2


def test_the_steady_path_enters_no_function_of_python(run: Any) -> None:
    """Bounds the work rather than the time: what the interpreter enters during a call."""
    script = f"""{CALLS}
import sys
def entered(call):
    call()
    names = []
    sys.setprofile(lambda frame, event, _: names.append((event, frame.f_code.co_name)))
    call()
    sys.setprofile(None)
    return [name for event, name in names if event == "call"]
plan = mla.plan(calls[0]["seq_lens"], s_q=2, h_q=8, d_qk=576, dtype=torch.bfloat16, page_size=16)
bare = {{name: t for name, t in calls[0].items() if name not in ("out", "lse")}}
with torch.no_grad():
    print(json.dumps([
        entered(lambda: mla.decode(**calls[0], scale=1.0, return_lse=True)),
        entered(lambda: mla.decode(**calls[0], scale=1.0, plan=plan)),
        entered(lambda: mla.decode(**bare, scale=1.0, return_lse=True)),
        entered(lambda: plan.update(calls[0]["seq_lens"])),
    ]))
print(json.dumps(_mla.num_prepared()))
"""
    done = run(script, prologue=AS_H200)
    steady, prepared = done.printed.splitlines()
    calls = [["<lambda>"]] * 3 + [["<lambda>", "update"]]
    assert json.loads(steady) == calls
    assert json.loads(prepared) == 3


def test_first_calls_are_bounded(run: Any) -> None:
    """In functions of Python that they enter: the first of a kind, and of other sizes."""
    script = f"""{CALLS}
import sys
def entered(b, heads):
    given = calls[0] | {{name: calls[0][name][:b] for name in ("block_table", "seq_lens")}}
    for name in ("q", "out", "lse"):
        given[name] = calls[0][name][:b, :, :heads].clone()
    names = []
    sys.setprofile(lambda frame, event, _: names.append((event, frame.f_code.co_name)))
    mla.decode(**given, scale=1.0)
    sys.setprofile(None)
    return [name for event, name in names if event == "call"]
entered(3, 8)
print(json.dumps([entered(3, 4), entered(2, 4), _mla.num_prepared()]))
"""
    kind, sizes, prepared = json.loads(run(script, prologue=AS_H200).printed)
    assert prepared == 3
    assert len(kind) <= 120
    assert sizes == []
