"""Which variant runs what, where, and why; and what is said when none does."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import threading
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla import _mla, costs, device, dispatch, estimate
from mla.device import CPU, Device, by_name
from mla.problem import Problem
from mla.variants import VARIANTS, Variant

GPUS = {
    "A100": (80, 108, 163),
    "RTX 3090": (86, 82, 99),
    "RTX 4090": (89, 128, 99),
    "RTX 5090": (120, 170, 99),
    "H100": (90, 132, 227),
    "H200": (90, 132, 227),
}
TARGETS = {163: "ampere_163k", 99: "ampere_99k", 227: "hopper"}
D_QK = (576, 320, 288, 512)

# (h_q, s_q) -> rows of an sm80 tile where the work fills the GPU: the smallest that holds a
# request's rows, else the largest.
BLOCK_ROWS = {
    (1, 1): 16,
    (6, 1): 16,
    (12, 1): 16,
    (16, 1): 16,
    (8, 2): 16,
    (20, 1): 32,
    (16, 2): 32,
    (32, 1): 32,
    (40, 1): 64,
    (16, 4): 64,
    (64, 1): 64,
    (96, 1): 64,
    (128, 1): 64,
    (128, 4): 64,
    (16, 512): 64,
}


def problem(
    h_q: int = 16,
    s_q: int = 1,
    *,
    b: int = 32,
    kv_len: int = 4096,
    d_qk: int = 576,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 64,
    total_q: int | None = None,
    batch_invariant: bool = False,
    max_seq_len: int | None = None,
) -> Problem:
    max_pages = -(-kv_len // page_size)
    return Problem.from_sizes(
        b=b,
        h_q=h_q,
        s_q=s_q,
        total_q=total_q,
        d_qk=d_qk,
        dtype=dtype,
        page_size=page_size,
        max_pages=max_pages,
        batch_invariant=batch_invariant,
        max_seq_len=max_seq_len,
    )


def gpu(name: str) -> Device:
    found = by_name(name)
    assert found is not None
    return found


def chosen(asked: Problem, where: Device, force: str | None = None) -> Variant:
    return dispatch.choose(asked, where, dispatch.forced(force))


def predicted_us(variant: Variant, asked: Problem, where: Device) -> float:
    found = estimate.estimate(variant, asked, where)
    assert found is not None
    return found.us


def cpu_call() -> dict[str, object]:
    return {
        "q": torch.zeros(2, 1, 16, 576, dtype=torch.bfloat16),
        "kv_cache": torch.zeros(4, 16, 576, dtype=torch.bfloat16),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "seq_lens": torch.tensor([3, 20], dtype=torch.int32),
        "scale": 0.1,
    }


class TestGolden:
    @pytest.mark.parametrize("name", GPUS)
    def test_facts(self, name: str) -> None:
        facts = gpu(name)
        assert (facts.sm, facts.sm_count, facts.smem_optin // 1024) == GPUS[name]
        assert facts.type == "cuda"
        assert facts.bandwidth > 0 < facts.tflops

    @pytest.mark.parametrize("d_qk", D_QK)
    @pytest.mark.parametrize("name", GPUS)
    @pytest.mark.parametrize(("h_q", "s_q"), BLOCK_ROWS)
    def test_choice(self, h_q: int, s_q: int, name: str, d_qk: int) -> None:
        """By a rule of thumb; what else is chosen is predicted to gain a little."""
        where = gpu(name)
        for b, kv_len in itertools.product((1, 4, 32, 128), (64, 1024, 8192, 131072)):
            asked = problem(h_q, s_q, b=b, kv_len=kv_len, d_qk=d_qk)
            variant = chosen(asked, where)
            assert variant.d_qk == d_qk
            targets = TARGETS[GPUS[name][2]]
            usual = [
                v
                for v in VARIANTS
                if (v.targets, v.d_qk) == (targets, d_qk)
                and (targets == "hopper" or v.block_rows == BLOCK_ROWS[h_q, s_q])
            ]
            if variant in usual:
                continue
            if b * max(kv_len // 128, 1) >= where.sm_count:
                gain = min(predicted_us(v, asked, where) for v in usual)
                assert gain <= 1.25 * predicted_us(variant, asked, where), (b, kv_len)
            elif variant.block_rows > usual[0].block_rows:
                # Of one tile, or of two where the usual ones are smaller: they take as long.
                least = min(predicted_us(v, asked, where) for v in usual)
                assert least <= 1.1 * predicted_us(variant, asked, where), (b, kv_len)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("page_size", [1, 3, 16, 64, 480])
    def test_neither_dtype_nor_pages_matter(self, dtype: torch.dtype, page_size: int) -> None:
        asked = problem(20, dtype=dtype, page_size=page_size)
        for name in GPUS:
            here, usual = chosen(asked, gpu(name)), chosen(problem(20), gpu(name))
            assert (here.pipeline, here.block_rows) == (usual.pipeline, usual.block_rows)

    def test_ragged_queries_count_by_their_average(self) -> None:
        assert chosen(problem(16, total_q=32), gpu("A100")).block_rows == 16
        assert chosen(problem(16, total_q=33), gpu("A100")).block_rows == 32
        assert chosen(problem(16, total_q=32 * 4), gpu("A100")).block_rows == 64

    def test_later_gpus_run_the_ampere_images(self) -> None:
        later = Device("B300", "cuda", sm=103, sm_count=148, smem_optin=227 * 1024)
        variant = chosen(problem(), replace(later, bandwidth=8000, tflops=2500))
        assert variant.pipeline == "sm80"

    def test_nothing_to_do_still_has_a_variant(self) -> None:
        for asked in (problem(b=0), problem(s_q=0), problem(kv_len=0), problem(total_q=0)):
            assert chosen(asked, gpu("A100")).pipeline == "sm80"
            assert chosen(asked, CPU).name == "cpu"

    def test_cpu(self) -> None:
        assert chosen(problem(), CPU).name == "cpu"

    def test_the_table_breaks_ties(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a GPU with room for both, equal tiles of the 163 KB kind come first."""
        asked, where = problem(16), gpu("A100")
        found = costs.of(where)
        one = found.classes["sm80.ampere_163k"]
        alike = found._replace(classes=dict.fromkeys(found.classes, one))
        monkeypatch.setattr(costs, "of", lambda _: alike)
        choice = dispatch.weigh(asked, where, None)
        rivals = [v for v in VARIANTS if v.name in choice.estimates and v.block_rows == 16]
        assert len({choice.estimates[v.name] for v in rivals}) == 1
        assert choice.variant is rivals[0]


class TestChoosing:
    """`choose` goes a shorter way than `weigh`, which explains; both end at the same variant."""

    @settings(deadline=None)
    @given(
        name=st.sampled_from([*GPUS, "cpu"]),
        force=st.sampled_from([None, *dict.fromkeys(v.pipeline for v in VARIANTS)]),
        b=st.integers(0, 300),
        s_q=st.integers(0, 9),
        h_q=st.integers(1, 200),
        kv_len=st.integers(0, 10**6),
        d_qk=st.sampled_from(D_QK),
        dtype=st.sampled_from([torch.bfloat16, torch.float16]),
        page_size=st.sampled_from([1, 3, 16, 64]),
        total_q=st.none() | st.integers(0, 300),
        batch_invariant=st.booleans(),
        max_seq_len=st.none() | st.integers(0, 10**6),
    )
    def test_as_explained(self, name: str, force: str | None, **sizes: Any) -> None:
        asked, where = problem(**sizes), CPU if name == "cpu" else gpu(name)
        request = dispatch.forced(force)
        explained = dispatch.weigh(asked, where, request).variant
        if explained is None:
            with pytest.raises(mla.UnsupportedError):
                dispatch.choose(asked, where, request)
        else:
            assert dispatch.choose(asked, where, request) is explained
            # Made for other sizes, as prepared calls have it.
            seen = asked._replace(b=3, s_q=0 if asked.ragged else 2, total_q=6, max_pages=9)
            name_of = dispatch.chooser(seen, where, request)
            if name_of is None:
                assert dispatch.choose(seen, where, request) is explained
            else:
                length = -1 if asked.max_seq_len is None else asked.max_seq_len
                sizes_asked = asked.b, asked.s_q, asked.total_q, asked.max_pages
                assert name_of(*sizes_asked, length) == explained.name


class TestForcing:
    def test_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Argument, then context, then environment."""
        gpu_name = VARIANTS[0].name
        assert dispatch.forced() is None
        monkeypatch.setenv("MLA_VARIANT", "sm80")
        assert dispatch.forced() == ("sm80", "MLA_VARIANT")
        with mla.use_variant("cpu"):
            assert dispatch.forced() == ("cpu", "mla.use_variant")
            with mla.use_variant(gpu_name):
                assert dispatch.forced() == (gpu_name, "mla.use_variant")
                assert dispatch.forced("sm80") == ("sm80", "variant=")
            assert dispatch.forced() == ("cpu", "mla.use_variant")
        assert dispatch.forced() == ("sm80", "MLA_VARIANT")
        monkeypatch.setenv("MLA_VARIANT", "")
        assert dispatch.forced() is None

    def test_a_pipeline_leaves_the_row_open(self) -> None:
        assert chosen(problem(20), gpu("RTX 3090"), "sm80") == chosen(problem(20), gpu("RTX 3090"))

    @pytest.mark.parametrize("block_rows", [16, 32, 64])
    def test_a_name_is_taken_as_it_is(self, block_rows: int) -> None:
        row = next(v for v in VARIANTS if v.block_rows == block_rows)
        assert chosen(problem(128, d_qk=row.d_qk), gpu("H200"), row.name) is row

    def test_unknown_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        message = (
            r"^variant: got 'hopper' \(forced by {}\), expected a pipeline \(.*cpu.*\) or a name"
        )
        with (
            pytest.raises(ValueError, match=message.format("mla.use_variant")),
            mla.use_variant("hopper"),
        ):
            pass
        monkeypatch.setenv("MLA_VARIANT", "hopper")
        with pytest.raises(ValueError, match=message.format("MLA_VARIANT")):
            mla.decode(**cpu_call())

    def test_context_ends_with_an_exception(self) -> None:
        with pytest.raises(ZeroDivisionError), mla.use_variant("cpu"):
            _ = 1 / 0
        assert dispatch.forced() is None

    def test_context_is_the_threads_own(self) -> None:
        seen: list[object] = []
        with mla.use_variant("cpu"):
            thread = threading.Thread(target=lambda: seen.append(dispatch.forced()))
            thread.start()
            thread.join()
        assert seen == [None]

    def test_context_is_the_tasks_own(self) -> None:
        async def inside() -> str | None:
            with mla.use_variant("cpu"):
                await asyncio.sleep(0)
                force = dispatch.forced()
                return force and force.name

        async def outside() -> object:
            await asyncio.sleep(0)
            return dispatch.forced()

        async def both() -> list[object]:
            return list(await asyncio.gather(inside(), outside()))

        assert asyncio.run(both()) == ["cpu", None]

    def test_decode_obeys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        call = cpu_call()
        mla.decode(**call, variant="cpu")
        with mla.use_variant("sm80"):
            mla.decode(**call, variant="cpu")
            with pytest.raises(mla.UnsupportedError, match=r"'sm80' \(forced by mla.use_variant\)"):
                mla.decode(**call)
        monkeypatch.setenv("MLA_VARIANT", "sm80")
        with pytest.raises(mla.UnsupportedError, match=r"'sm80' \(forced by MLA_VARIANT\) cannot"):
            mla.decode(**call)
        with mla.use_variant("cpu"):
            mla.decode(**call)

    def test_a_plan_is_for_its_variant(self) -> None:
        call = cpu_call()
        plan = mla.plan(call["seq_lens"], h_q=16, d_qk=576, dtype=torch.bfloat16, page_size=16)
        mla.decode(**call, plan=plan, variant="cpu")
        message = (
            r"^plan: got a plan for variant cpu, expected variant 'sm80' \(forced by variant=\)$"
        )
        with pytest.raises(ValueError, match=message):
            mla.decode(**call, plan=plan, variant="sm80")


class TestRefusals:
    """Each names every variant and its reasons."""

    def refused(
        self, where: Device, force: str | None = None, **sizes: int
    ) -> dict[str, list[str]]:
        with pytest.raises(mla.UnsupportedError) as caught:
            chosen(problem(**sizes), where, force)
        error = caught.value
        assert isinstance(error, NotImplementedError)
        assert list(error.reasons) == [variant.name for variant in mla.variants()]
        lines = str(error).splitlines()
        assert lines[1:] == [f"  {name}: {'; '.join(why)}" for name, why in error.reasons.items()]
        who = f"variant '{force}' (forced by variant=) cannot run" if force else "no variant runs"
        assert lines[0].startswith(f"{who} this problem on {where}: b=32, s_q=1, h_q=16, up to")
        return error.reasons

    def test_old_gpus(self) -> None:
        turing = Device("Tesla T4", "cuda", sm=75, sm_count=40, smem_optin=64 * 1024)
        for name, reasons in self.refused(turing).items():
            if name == "cpu":
                assert reasons == ["runs on cpu tensors, not on cuda"]
            else:
                needed = "sm_80 or later" if name.startswith("sm80") else "sm_90"
                assert f"needs {needed}, the GPU is sm_75" in reasons

    def test_no_driver(self) -> None:
        broken = replace(gpu("H200"), problem="the driver is too old")
        reasons = self.refused(broken)
        assert all("the driver is too old" in reasons[v.name] for v in VARIANTS if not v.on_host)

    def test_cpu_forced_on_a_gpu(self) -> None:
        reasons = self.refused(gpu("A100"), "cpu")
        assert reasons["cpu"] == ["runs on cpu tensors, not on cuda"]
        assert reasons[chosen(problem(), gpu("A100")).name] == [
            "could run, but is not the forced one"
        ]

    def test_gpu_variant_forced_on_a_cpu(self) -> None:
        reasons = self.refused(CPU, "sm80")
        assert reasons["cpu"] == ["could run, but is not the forced one"]
        assert reasons[VARIANTS[0].name] == ["runs on cuda tensors, not on cpu"]

    def test_other_kinds_of_device(self) -> None:
        call = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in cpu_call().items()
        }
        with pytest.raises(mla.UnsupportedError, match="no variant runs this problem on meta"):
            mla.decode(**call)

    def test_row_of_other_dims(self) -> None:
        row = next(v for v in VARIANTS if v.d_qk == 320)
        reasons = self.refused(gpu("H200"), row.name)
        assert reasons[row.name] == ["is for d_qk = 320, d_v = 256, not 576, 512"]

    def test_row_that_needs_more_shared_memory(self) -> None:
        rows = [v for v in VARIANTS if (v.pipeline, v.d_qk) == ("sm80", 576)]
        largest = max(rows, key=lambda v: v.smem_bytes)
        (reason,) = self.refused(gpu("RTX 4090"), largest.name)[largest.name]
        assert re.fullmatch(r"needs 1\d\d KB of shared memory, the GPU has 99 KB", reason)

    def test_limits_that_no_row_has_yet(self) -> None:
        row = replace(VARIANTS[0], dtypes=("float16",), page_multiple=64, min_sm=90, exact_sm=True)
        reasons = row.unsupported(problem(d_qk=row.d_qk, page_size=16).kind, gpu("RTX 5090"))
        assert "needs sm_90, the GPU is sm_120" in reasons
        assert "has float16, not bfloat16" in reasons
        assert "needs pages of a multiple of 64 tokens, not 16" in reasons


class TestExplain:
    def test_sizes(self) -> None:
        told = mla.explain(b=4, h_q=128, kv_len=8192, device="RTX 3090")
        assert told.variant is chosen(problem(128, b=4, kv_len=8192), gpu("RTX 3090"))
        assert told.error is None
        assert told.estimate is not None
        report = str(told)
        assert "RTX 3090 (sm_86, 82 SMs, 99 KB)" in report
        assert f"{told.variant.name} (predicted to be the fastest of the " in report
        assert f"predicted {told.estimate.us:.1f} us, {told.estimate.bound} bound" in report
        assert "128 query rows a request, 2 x 64" in report
        assert f"workspace  {told.workspace_bytes} bytes" in report
        for variant in mla.variants():
            assert variant.name in report
        assert "of shared memory, the GPU has 99 KB" in report
        assert report.count("could run, predicted") == len(told.choice.estimates) - 1

    def test_tensors_and_the_rest_of_a_call(self) -> None:
        told = mla.explain(**cpu_call(), return_lse=True)
        assert told.variant is not None
        assert told.variant.name == "cpu"
        assert told.estimate is None
        assert told.workspace_bytes == 0
        assert "cpu (the only one that can run it)" in str(told)

    def test_forced(self) -> None:
        name = chosen(problem(128), gpu("H200")).name
        assert f"{name} (forced by variant=, predicted" in str(
            mla.explain(device="H200", variant=name)
        )
        with mla.use_variant("sm80"):
            assert "(forced by mla.use_variant, predicted" in str(mla.explain(device="H200"))

    def test_nothing_runs(self) -> None:
        told = mla.explain(device="A100", variant="cpu")
        assert told.variant is None
        assert told.estimate is None
        assert isinstance(told.error, mla.UnsupportedError)
        assert told.workspace_bytes == 0
        assert "no variant: 'cpu' (forced by variant=) cannot run" in str(told)
        old = Device("Tesla T4", "cuda", sm=75, sm_count=40, smem_optin=64 * 1024)
        assert "variant    no variant\n" in str(mla.explain(device=old))

    def test_devices(self) -> None:
        for asked in ("NVIDIA H200", "h200", gpu("H200")):
            assert mla.explain(device=asked).device == gpu("H200")
        assert mla.explain(device="cpu").device == CPU
        assert mla.explain(device=torch.device("cpu")).device == CPU
        assert by_name("NVIDIA GH200 480GB") is None, "words, not parts of words"
        assert by_name("NVIDIA A100-SXM4-80GB") is device.KNOWN[0]

    def test_estimates_grow_with_the_work(self) -> None:
        def us(**sizes: int) -> float:
            found = mla.explain(device="H200", **sizes).estimate
            assert found is not None
            return found.us

        assert us(b=64) > us(b=32)
        assert us(b=32, kv_len=8192) > us(b=32)
        assert us(b=32, s_q=4) > us(b=32)
        assert (
            us(b=0)
            == us(b=1, s_q=0)
            >= min(found.start_us for found in costs.of(gpu("H200")).classes.values())
        )

    def test_bounds(self) -> None:
        def bound(**sizes: int) -> str:
            found = mla.explain(**sizes).estimate  # type: ignore[arg-type]
            assert found is not None
            return found.bound

        assert bound(device="H200", b=1, kv_len=64, h_q=16) == "latency"
        assert bound(device="H200", b=128, kv_len=8192, h_q=16) == "memory"
        assert bound(device="RTX 3090", b=128, kv_len=8192, h_q=128) == "compute"

    def test_parts_of_an_estimate(self) -> None:
        told = mla.explain(device="H200", b=128, kv_len=8192, h_q=16)
        found, report = told.estimate, str(told)
        assert found is not None
        assert max(found.memory_us, found.compute_us) + found.latency_us <= found.us
        assert found.us <= found.memory_us + found.compute_us + found.latency_us
        assert f"memory {found.memory_us:.1f} us beside tiles {found.compute_us:.1f} us" in report
        assert "constants  measured on an H200\n" in report

    def test_floor(self) -> None:
        """DeepSeek-V3's cache at 4.8 TB/s, or products at 989 TFLOP/s, and an empty launch."""
        told = mla.explain(device="H200", b=128, kv_len=8192, h_q=16)
        moved = 128 * 8192 * 1152 + 128 * 16 * 2176
        assert told.floor_us == pytest.approx(2.7 + moved / 4800e3)
        assert f"floor      {told.floor_us:.1f} us" in str(told)
        many = mla.explain(device="H200", b=128, kv_len=8192, h_q=128, s_q=4)
        assert many.floor_us == pytest.approx(2.7 + 2 * 512 * 128 * 8192 * 1088 / 989e6)
        assert mla.explain(device="cpu").floor_us is None
        for name in GPUS:
            for h_q, b in itertools.product((16, 128), (1, 128)):
                told = mla.explain(device=name, b=b, h_q=h_q)
                assert told.estimate is not None
                assert told.floor_us is not None
                assert told.floor_us < told.estimate.us


class TestLog:
    def test_once_for_each_kind(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        call = cpu_call()
        with caplog.at_level(logging.INFO, logger="mla"):
            mla.decode(**call)
            assert not caplog.records
            monkeypatch.setenv("MLA_LOG", "dispatch")
            for _ in range(3):
                mla.decode(**call)
            (record,) = caplog.records
            assert record.name == "mla"
            assert record.getMessage() == (
                "cpu (the only one that can run it) on cpu for b=2, s_q=1, h_q=16, "
                "up to 32 KV tokens, page_size=16, d_qk=576, d_v=512, bfloat16"
            )
            mla.decode(**call, variant="cpu")
            call["q"] = torch.zeros(2, 1, 8, 576, dtype=torch.bfloat16)
            mla.decode(**call, variant="cpu")
            assert len(caplog.records) == 2
            assert caplog.messages[1].startswith("cpu (forced by variant=) on cpu for b=2, s_q=1")

    def test_shown_without_any_configuration(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("MLA_LOG", "dispatch")
        logger = logging.getLogger("mla")
        with monkeypatch.context() as patch:
            patch.setattr(logger, "propagate", False)
            patch.setattr(logger, "handlers", [])
            patch.setattr(logger, "level", logging.NOTSET)
            mla.decode(**cpu_call())
            assert len(logger.handlers) == 1
        assert re.match(r"mla: cpu \(the only .*\n$", capsys.readouterr().err)

    def test_nothing_is_installed_unasked(self) -> None:
        logger = logging.getLogger("mla")
        handlers = list(logger.handlers)
        mla.decode(**cpu_call())
        assert logger.handlers == handlers


class TestInfo:
    def test_without_a_gpu(self) -> None:
        told = mla.info()
        assert json.loads(json.dumps(told)).keys() == told.keys()
        assert told["version"] == mla.__version__ == _mla.build_info()["version"]
        assert told["build"] == _mla.build_info()
        assert told["driver"].keys() == {"version", "problem"}
        assert [row["name"] for row in told["variants"]] == [v.name for v in mla.variants()]
        first = told["devices"][0]
        assert first["name"] == "cpu"
        assert first["variants"]["cpu"] == []
        assert first["variants"][VARIANTS[0].name] == ["runs on cuda tensors, not on cpu"]
        assert isinstance(told["workspaces"], list)

    def test_preload_on_a_cpu(self) -> None:
        assert mla.preload("cpu") == ()
        assert mla.preload("cpu", "cpu") == ()
        with pytest.raises(mla.UnsupportedError, match="nothing to load runs on cpu"):
            mla.preload("cpu", "sm80")
        with pytest.raises(ValueError, match=r"^variant: got 'nosuch'"):
            mla.preload("cpu", "nosuch")
