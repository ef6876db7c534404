"""Which way prefill goes: the model of costs, what it is fitted to, and how it is told."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mla
import pytest
import torch
from command_line import Output, command
from mla import device, fused, launch, prefill_choice, prefill_costs, prefill_estimate
from mla.cli import prefill_fit, prefill_points
from mla.cli.prefill_points import Point
from mla.cli.usage import UsageError
from mla.device import KNOWN, by_name
from mla.models import MODELS
from mla.prefill_choice import WORKSPACE_BYTES, Sizes, absorbed_at_once, cheaper_of
from mla.prefill_costs import PrefillCosts
from mla.prefill_estimate import Request
from mla.prefill_times import METHODS, Times
from test_bench import BENCHMARKS

V3 = MODELS["DeepSeek-V3"].dims
SWEEP = BENCHMARKS / "h200" / "prefill.json"
WORST = 1.05  # of the time of the way chosen over that of the better one
LEVEL_US = 2.0  # that one of them takes less: neighbours in the sweep differ as much
in_repository = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the tests were copied out of the repository"
)


def h200() -> device.Device:
    found = by_name("H200")
    assert found is not None
    return found


def request(new: int, cached: int, heads: int = 128, b: int = 1) -> Request:
    dims = replace(V3, heads=heads)
    return Request(dims, torch.bfloat16, b, new, new + cached, 64, True, WORKSPACE_BYTES)


@in_repository
@pytest.mark.parametrize("captured", [True, False])
def test_choice_is_the_better_one_of_the_recorded_sweep(captured: bool) -> None:
    """In a CUDA graph, where the GPU's time counts, and without, where the host's does too."""
    points = prefill_points.read(SWEEP)
    assert {p.heads for p in points} == {16, 128}
    assert {p.new for p in points} >= {1 << i for i in range(13)}
    assert {0, 65536} <= {p.cached for p in points}
    regrets = {}
    for p in points:
        cudnn = fused.CUDNN in p.attention or p.new < 128
        found = prefill_estimate.estimate(request(p.new, p.cached, p.heads), h200(), cudnn)
        took = {method: p.took(method, captured) for method in METHODS}
        chosen, better = took[found.method(captured)], min(took.values())
        regrets[p.heads, p.new, p.cached] = 1.0 if chosen < better + LEVEL_US else chosen / better
    assert {point: regret for point, regret in regrets.items() if regret > WORST} == {}


@in_repository
def test_the_built_in_constants_are_those_of_the_recorded_sweep(tmp_path: Path) -> None:
    target = tmp_path / "costs.json"
    assert command(f"fit --prefill --gpu H200 --out {target} {SWEEP}") == 0
    again = prefill_costs.parse(target.read_text()).costs
    assert again == pytest.approx(prefill_costs.built_in().costs, rel=0.02)


@in_repository
def test_the_fit_moves_the_share_of_decode_to_where_the_choice_costs_least() -> None:
    """By 2 % at most: what least squares leave undecided, as they do not see which is shorter."""
    samples = [prefill_fit.sample(p, h200()) for p in prefill_points.read(SWEEP)]

    def regret(costs: PrefillCosts) -> float:
        return sum(
            math.log(s.regret(costs, captured)) for s in samples for captured in (False, True)
        )

    best = prefill_costs.built_in().costs
    off = best._replace(decode_factor=best.decode_factor * 1.02)
    found = prefill_fit.balanced(off, samples)
    assert regret(found) == pytest.approx(regret(best))
    assert regret(found) < 0.9 * regret(off)
    assert found.decode_factor == pytest.approx(off.decode_factor, rel=0.021)
    assert found._replace(decode_factor=0) == off._replace(decode_factor=0)


class TestEstimate:
    def test_few_tokens_are_absorbed_and_many_expanded(self) -> None:
        for gpu in KNOWN:
            for heads in (16, 128):
                few = prefill_estimate.estimate(request(1, 8192, heads), gpu, gpu.sm == 90)
                many = prefill_estimate.estimate(request(4096, 8192, heads), gpu, gpu.sm == 90)
                for captured in (True, False):
                    assert few.method(captured) == "absorbed", gpu
                    assert many.method(captured) == "expanded", gpu

    def test_more_work_takes_longer(self) -> None:
        for cudnn in (True, False):
            for new, cached in ((1, 500), (128, 0), (128, 4096), (2048, 20000)):
                found = prefill_estimate.estimate(request(new, cached), h200(), cudnn)
                for other in (request(2 * new, cached), request(new, 2 * cached + 512)):
                    more = prefill_estimate.estimate(other, h200(), cudnn)
                    assert found.absorbed is not None
                    assert more.absorbed is not None
                    assert more.absorbed.gpu > 0.99 * found.absorbed.gpu
                    assert more.absorbed.host >= found.absorbed.host
                    assert more.expanded.gpu > 0.99 * found.expanded.gpu
                    assert more.expanded.host >= found.expanded.host

    def test_requests_of_a_batch_share_launches(self) -> None:
        one = prefill_estimate.estimate(request(4, 1000, 16), h200(), True)
        many = prefill_estimate.estimate(request(4, 1000, 16, b=64), h200(), True)
        assert one.absorbed is not None
        assert many.absorbed is not None
        assert many.absorbed.gpu < one.absorbed.gpu / 5
        assert many.absorbed.host == one.absorbed.host / 64
        assert many.expanded.gpu < one.expanded.gpu / 2
        assert many.expanded.host < one.expanded.host / 2

    def test_a_short_prompt_waits_for_the_host(self) -> None:
        """Un-absorbed saves the GPU some time and costs the host more, unless it is captured."""
        found = prefill_estimate.estimate(request(256, 0, 16), h200(), True)
        assert found.method(captured=True) == "expanded"
        assert found.method(captured=False) == "absorbed"

    def test_the_longer_time_counts(self) -> None:
        assert [Times(30.0, 40.0).us(captured) for captured in (True, False)] == [30, 40]
        assert [Times(50.0, 40.0).us(captured) for captured in (True, False)] == [50, 50]

    def test_without_a_kernel_it_is_expanded(self) -> None:
        other = request(1, 8192)._replace(dims=replace(V3, kv_lora=128))
        found = prefill_estimate.estimate(other, h200(), True)
        assert found.absorbed is None
        assert found.method(captured=True) == found.method(captured=False) == "expanded"


class TestChoice:
    """On a GPU, as far as it can be told without one."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prefill_choice, "facts", lambda _: h200())
        monkeypatch.setattr(launch, "capturing", lambda _: False)
        monkeypatch.setattr(fused, "cudnn_works", lambda *_: True)

    def sizes(self, b: int, tokens: int, reach: int, **changes: Any) -> Sizes:
        found = Sizes(
            V3, torch.bfloat16, torch.device("cuda"), b, tokens, -(-reach // 64), 1 << 20, 64, True,
            WORKSPACE_BYTES,
        )  # fmt: skip
        return found._replace(**changes)

    def test_of_requests(self) -> None:
        sizes = self.sizes(2, 4097, 70000)
        for captured in (True, False):
            assert cheaper_of(sizes, 1, 5000, captured) == "absorbed"
            assert cheaper_of(sizes, 4096, 65536, captured) == "expanded"
            wide = sizes._replace(dtype=torch.float32)
            assert cheaper_of(wide, 1, 5000, captured) == "expanded"

    def test_decode_steps_do_not_wait_for_lengths(self) -> None:
        for b in (1, 64, 512):
            assert absorbed_at_once(self.sizes(b, b, 1 << 17), 1)
            assert absorbed_at_once(self.sizes(b, 4 * b, 1 << 17), 4)

    def test_prompts_do(self) -> None:
        assert not absorbed_at_once(self.sizes(1, 4096, 1 << 16), 4096)
        assert not absorbed_at_once(self.sizes(8, 8 * 2048, 2048), 2048)

    def test_what_is_gained_must_be_worth_a_plan(self) -> None:
        """A short prompt's few microseconds are not."""
        assert cheaper_of(self.sizes(1, 96, 128), 96, 96, captured=True) == "expanded"
        assert absorbed_at_once(self.sizes(1, 96, 128), 96)

    def test_captured_is_absorbed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "capturing", lambda _: True)
        assert absorbed_at_once(self.sizes(1, 4096, 1 << 16), 4096)

    def test_predictions_are_kept(self) -> None:
        """Of lengths that are nearly alike there is one."""
        sizes = self.sizes(1, 4096, 1 << 17)
        found = {sizes.request(1, 1000, length) for length in range(60000, 61000)}
        assert len(found) == 2
        assert all(r.new >= 1000 and r.length >= 60000 for r in found)


class TestCosts:
    def test_of_others_are_predicted(self) -> None:
        mine = prefill_costs.of(h200())
        assert mine.source == "measured on an H200"
        for gpu in KNOWN:
            found = prefill_costs.of(gpu)
            if gpu.name != "H200":
                assert found.source.startswith("predicted from published figures")
            assert found.costs.memory_gbs / gpu.bandwidth == pytest.approx(
                mine.costs.memory_gbs / h200().bandwidth
            )
            assert found.costs.product_tflops < gpu.tflops
            assert found.costs.planning_us == mine.costs.planning_us

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 0}, "format: got 0, expected 2"),
            ({"costs": {"memory_gbs": 1}}, "costs: got memory_gbs, expected absorbed_us"),
            ({"memory_gbs": 0}, "memory_gbs: got 0, expected a number above 0"),
            ({"memory_gbs": math.inf}, "memory_gbs: got inf, expected a number above 0"),
        ],
    )
    def test_wrong_files(self, changes: dict[str, Any], message: str) -> None:
        content = json.loads(prefill_costs.dump("H200", 132, prefill_costs.built_in().costs, {}))
        if changes.keys() <= content.keys():
            content |= changes
        else:
            content["costs"] |= changes
        with pytest.raises(ValueError, match=f"^{message}"):
            prefill_costs.parse(json.dumps(content))


class TestFit:
    def points(self, costs: PrefillCosts, noise: float = 0.02) -> list[Point]:
        """As a GPU with these constants would take."""
        dice = random.Random(0)
        points = []
        for heads in (16, 128):
            for new in (1, 16, 64, 128, 300, 1024):
                for cached in (0, 700, 5000, 40000):
                    attention = fused.CUDNN if new >= 128 else fused.FLASH
                    empty = Point(heads, new, cached, {}, {}, {"expanded": 300.0}, attention)
                    made = prefill_fit.sample(empty, h200())
                    times = {
                        method: [us * math.exp(dice.gauss(0, noise)) for us in predicted]
                        for method in METHODS
                        for predicted in [made.predicted(method, costs)]
                    }
                    us, host_us = ({m: times[m][i] for m in METHODS} for i in range(2))
                    points.append(replace(empty, us=us, host_us=host_us))
        return points

    def test_constants_are_found_again(self) -> None:
        true = prefill_costs.built_in().costs._replace(
            absorbed_us=40, decode_factor=1.2, cudnn_tflops=400, memory_gbs=2000, planning_us=300,
            absorbed_host_us=150, attention_host_us=80,
        )  # fmt: skip
        samples = [prefill_fit.sample(point, h200()) for point in self.points(true)]
        found = prefill_fit.fit(samples, h200())
        for name in (
            "absorbed_us", "decode_factor", "cudnn_tflops", "planning_us", "absorbed_host_us",
            "attention_host_us",
        ):  # fmt: skip
            assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.1), name
        for captured in (True, False):
            assert max(sample.regret(found, captured) for sample in samples) < 1.1

    def test_command(self, tmp_path: Path, capsys: Output) -> None:
        sweep, target = tmp_path / "sweep.json", tmp_path / "costs.json"
        prefill_points.write(sweep, self.points(prefill_costs.built_in().costs, noise=0))
        assert command(f"fit --prefill --gpu H200 --out {target} {sweep}") == 0
        printed = capsys.readouterr().out
        assert "in a CUDA graph the choice costs 0.0" in printed
        assert "without one the choice costs 0.0" in printed
        assert json.loads(target.read_text())["made"]["points"] == 48
        found = prefill_costs.parse(target.read_text()).costs
        assert found.cudnn_tflops == pytest.approx(
            prefill_costs.built_in().costs.cudnn_tflops, rel=0.02
        )

    @pytest.mark.parametrize(
        "text", ["", "{}", "[]", '[{"heads": 3}]', '[{"id": "main/x", "us": 3}]']
    )
    def test_refuses_other_files(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "sweep.json"
        path.write_text(text)
        with pytest.raises(UsageError, match=r"sweep\.json"):
            prefill_points.read(path)


def test_sweep_on_a_cpu(tmp_path: Path, capsys: Output) -> None:
    target = tmp_path / "sweep.json"
    assert command(f"bench --prefill --device cpu --repeat 1 --json {target}") == 0
    points = prefill_points.read(target)
    assert [(p.new, p.cached) for p in points] == [(1, 0), (1, 100), (48, 0), (48, 100)]
    assert {p.attention for p in points} == {fused.PRODUCTS}
    conditions = json.loads((tmp_path / "sweep.meta.json").read_text())
    assert conditions["method"] == "wall clock around one call"
    assert fused.PRODUCTS in capsys.readouterr().out


class TestExplain:
    def test_of_a_gpu_elsewhere(self) -> None:
        found = mla.explain_prefill(2048, 4096, device="H200", heads=16)
        assert found.method == found.captured_method == "expanded"
        assert found.estimate is not None
        for times, by in zip(found.estimate, ("mla.decode", "cuDNN's attention"), strict=True):
            assert times is not None
            line = f"{times.gpu:.1f} us a request, by {by}; {times.host:.1f} of the host"
            assert line in str(found)
        text = str(found)
        assert "method     expanded, in a CUDA graph expanded" in text
        assert "constants  measured on an H200" in text
        assert mla.explain_prefill(1, 4096, device="H200").method == "absorbed"
        short = mla.explain_prefill(256, device="H200", heads=16)
        assert (short.method, short.captured_method) == ("absorbed", "expanded")

    def test_of_one_never_measured(self) -> None:
        text = str(mla.explain_prefill(2048, 4096, device="RTX 4090"))
        assert "by torch's flash attention" in text
        assert "predicted from published figures; never measured here" in text

    def test_on_a_cpu(self) -> None:
        found = mla.explain_prefill(20, device="cpu")
        assert found.method == "absorbed"
        assert found.costs is None
        assert "multiplications decide" in str(found)
        assert mla.explain_prefill(2000, device="cpu").method == "expanded"
        assert mla.explain_prefill(1, device="cpu", dtype=torch.float32).method == "expanded"

    def test_wrong_sizes(self) -> None:
        for sizes, message in (
            ({"new": 0}, "new: got 0, expected 1"),
            ({"new": 1, "cached": -1}, "cached: got -1, expected 0"),
            ({"new": 1, "b": 0}, "b: got 0"),
            ({"new": 1, "heads": 0}, "heads: got 0, expected 1"),
            ({"new": 1, "device": "Voodoo"}, "device: got 'Voodoo'"),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                mla.explain_prefill(**sizes)

    def test_wrong_kinds(self) -> None:
        for kinds, message in (
            ({"dims": 3}, "dims: got int, expected mla.models' or a LayerConfig's"),
            ({"dtype": "x"}, "dtype: got x, expected torch.bfloat16 or torch.float16"),
        ):
            with pytest.raises(TypeError, match=f"^{message}"):
                mla.explain_prefill(1, device="cpu", **kinds)

    def test_command(self, capsys: Output) -> None:
        assert command("explain --prefill --s-q 512 --kv 4608 --h 16 --gpu H200") == 0
        found = mla.explain_prefill(512, 4096, heads=16, device="H200")
        assert capsys.readouterr().out == f"{found}\n"
        assert command("explain --prefill --s-q 512 --kv 100 --gpu H200") == 2
        assert "--kv 100: expected --s-q 512 or more" in capsys.readouterr().err
        assert command("explain --prefill --variant cpu --gpu H200") == 2
        assert "--variant says nothing with --prefill" in capsys.readouterr().err
