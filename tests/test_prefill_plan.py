"""mla.plan_prefill: one plan for all layers of a step; and mla bench --prompt, which uses it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mla
import pytest
import torch
from command_line import Output, command
from mla import prefill_choice
from mla.cli import prompt, prompt_stack
from mla.prefill_times import Method
from paged_layer import Pages, randomise
from prefilling import Case, Problem, make_prefill
from test_bench import BENCHMARKS


def plan_of(problem: Problem, **changes: Any) -> mla.PrefillPlan:
    case, given = problem.case, problem.kwargs
    cache = given["kv_cache"][0] if case.split else given["kv_cache"]
    d = case.dims
    options = {
        "dims": mla.layer_config.Dims(
            heads=d.heads, kv_lora=d.kv_lora, nope=d.nope, rope=d.rope, v=d.v
        ),
        "dtype": case.dtype,
        "num_pages": cache.shape[0],
        "page_size": case.page_size,
        "causal": case.causal,
    }
    if isinstance(case.new, int):
        options["s"] = case.new
    else:
        options |= {"cu_seqlens_q": given["cu_seqlens_q"], "tokens": sum(case.new)}
    return mla.plan_prefill(given["block_table"], given["seq_lens"], **options | changes)


MIXED = Case((97, 40, 16, 200), (60, 2, 1, 90))  # long, short, short, long


@pytest.mark.parametrize(
    "case",
    [
        Case((60, 70), 20),
        Case((60, 70), 60),
        MIXED,
        replace(MIXED, new=(1, 40, 16, 2)),  # neighbours
        replace(MIXED, split=True, causal=False),
    ],
    ids=str,
)
def test_plan_gives_what_no_plan_gives(case: Case) -> None:
    problem = make_prefill(case)
    plan = plan_of(problem)
    for _ in range(2):
        result = mla.prefill(**problem.kwargs, plan=plan)
        assert result.method == plan.method
        problem.check(result)
    without = mla.prefill(**problem.kwargs)
    assert without.method == plan.method
    assert torch.equal(without.out, result.out)


def test_each_request_has_its_method() -> None:
    plan = plan_of(make_prefill(MIXED))
    assert plan.methods == ("expanded", "absorbed", "absorbed", "expanded")
    assert plan.method == "both"
    result = mla.prefill(**make_prefill(MIXED).kwargs)
    assert result.method == "both"
    assert result.attention == "mla.decode and torch, in float32"


@pytest.mark.parametrize("method", ["absorbed", "expanded"])
def test_method_is_planned(method: Method) -> None:
    problem = make_prefill(MIXED)
    plan = plan_of(problem, method=method)
    assert plan.method == method
    result = mla.prefill(**problem.kwargs, plan=plan)
    assert result.method == method
    problem.check(result)


@pytest.mark.parametrize(
    ("planned", "called", "message"),
    [
        ({"workspace_bytes": 1 << 25}, {}, "plan: got a plan for workspace_bytes = 33554432"),
        ({"causal": False}, {}, "plan: got a plan for causal = False, expected causal = True"),
        ({"num_pages": 3}, {}, "plan: got a plan for num_pages = 3"),
        ({}, {"method": "absorbed"}, "plan: got a plan, expected None with a method"),
        ({}, {"variant": "cpu"}, "plan: got a plan, expected None with a method"),
    ],
)
def test_plan_for_another_call(
    planned: dict[str, Any], called: dict[str, Any], message: str
) -> None:
    problem = make_prefill(MIXED)
    plan = plan_of(problem, **planned)
    with pytest.raises(ValueError, match=f"^{message}"):
        mla.prefill(**problem.kwargs, plan=plan, **called)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"s": 3},
            ValueError,
            "s, cu_seqlens_q, tokens: got s, cu_seqlens_q, tokens, expected s, or else cu_seqlens",
        ),
        ({"tokens": None}, ValueError, "s, cu_seqlens_q, tokens: got cu_seqlens_q, expected s, or"),
        ({"dims": 5}, TypeError, "dims: got int, expected mla.models' or a LayerConfig's"),
        ({"dtype": torch.float64}, TypeError, "dtype: got torch.float64"),
        ({"method": "both"}, ValueError, "method: got 'both'"),
        ({"page_size": 0}, ValueError, "page_size: got 0"),
        ({"workspace_bytes": 1, "method": "expanded"}, ValueError, "workspace_bytes: got 1, exp"),
    ],
)
def test_wrong(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        plan_of(make_prefill(MIXED), **changes)


class TestLayer:
    def layer(self) -> mla.nn.MultiHeadLatentAttention:
        config = replace(prompt_stack.lite_config(), hidden=64, heads=4, nope=32, v=24)
        layer = mla.nn.MultiHeadLatentAttention(config, dtype=torch.bfloat16)
        randomise(layer)
        return layer

    def plan(self, pages: Pages, layer: mla.nn.MultiHeadLatentAttention, s: int) -> Any:
        return mla.plan_prefill(
            pages.table, pages.lens + s, dims=layer.config, dtype=torch.bfloat16,
            num_pages=len(pages.kv), page_size=16, s=s,
        )  # fmt: skip

    @pytest.mark.parametrize("s", [3, 70])
    def test_takes_a_plan(self, s: int) -> None:
        layer = self.layer()
        hidden = torch.randn(2, s, 64).bfloat16()
        mine, other = Pages(layer, 2, 100), Pages(layer, 2, 100)
        plan = self.plan(mine, layer, s)
        got = mine.step(layer, hidden, plan=plan)
        assert torch.equal(got, other.step(layer, hidden))

    def test_refuses_a_plan_beside_a_method(self) -> None:
        layer = self.layer()
        pages = Pages(layer, 2, 100)
        plan = self.plan(pages, layer, 3)
        with pytest.raises(ValueError, match=r"^plan: got a plan of mla\.plan_prefill"):
            pages.step(layer, torch.zeros(2, 3, 64).bfloat16(), plan=plan, method="expanded")


def test_ways_of_the_prompt_table_agree() -> None:
    """Prompts in ubatches and a token behind them."""
    ways = prompt.contenders(prompt.ON_CPU, torch.device("cpu"))
    assert [way.name for way in ways] == ["matmul", "absorbed", "expanded", "switch"]
    hidden = torch.randn(1, 24, prompt_stack.HIDDEN).bfloat16()
    for begin, end in ((0, 16), (16, 23), (23, 24)):
        wanted = ways[0].step(hidden[:, begin:end], begin)().float()
        for way in ways[1:]:
            got = way.step(hidden[:, begin:end], begin)().float()
            assert (got - wanted).norm() < 0.01 * wanted.norm(), way.name


def test_prompt_table_on_a_cpu(tmp_path: Path, capsys: Output) -> None:
    target = tmp_path / "prompt.json"
    assert command(f"bench --prompt --device cpu --repeat 1 --json {target}") == 0
    entries = json.loads(target.read_text())
    ways = ("matmul", "absorbed", "expanded", "switch")
    work = [("prompt", 8), ("prompt", 40), ("generation", 0), ("generation", 20)]
    assert [(e["kind"], e["tokens"], e["way"]) for e in entries] == [
        (kind, tokens, way) for kind, tokens in work for way in ways
    ]
    assert all(entry["eager_tokens_per_s"] > 0 for entry in entries)
    conditions = json.loads((tmp_path / "prompt.meta.json").read_text())
    assert conditions["layers"] == 1
    assert "prompt 40" in capsys.readouterr().out


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the tests were copied out of the repository")
def test_recorded_prompts_are_faster_than_by_products() -> None:
    """At every length, in CUDA graphs and without; the memory of a step stays below the cap."""
    entries = json.loads((BENCHMARKS / "h200" / "prompt.json").read_text())
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for e in entries:
        found.setdefault((e["kind"], e["tokens"]), {})[e["way"]] = e
    for speed in ("tokens_per_s", "eager_tokens_per_s"):
        faster = {
            work: ways["switch"][speed] / ways["matmul"][speed] for work, ways in found.items()
        }
        assert set(faster) == {
            *(("prompt", 512 << i) for i in range(6)),
            *(("generation", depth) for depth in (0, 4096, 16384, 65535)),
        }
        assert min(faster.values()) > 1
        assert faster["prompt", 512] > 1.3
        assert faster["prompt", 16384] > 2.5
    for ways in found.values():
        assert ways["switch"]["buffer_mb"] < prefill_choice.WORKSPACE_BYTES / 2**20
        best = max(ways[way]["tokens_per_s"] for way in ("absorbed", "expanded"))
        assert ways["switch"]["tokens_per_s"] > 0.93 * best
