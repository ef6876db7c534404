"""The constants of predictions: their file, where they come from, and how they are fitted."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mla
import pytest
from mla import _mla, costs, costs_file, device, dispatch, tuned
from mla.costs_file import Costs
from mla.device import Device, by_name

NEVER_MEASURED = ("A100", "RTX 3090", "RTX 4090", "RTX 5090", "H20", "H100")


def gpu(name: str) -> Device:
    found = by_name(name)
    assert found is not None
    return found


def classes() -> dict[str, Costs]:
    return dict(costs.built_in()[2])


def save(where: Device, changed: dict[str, Costs] | None = None) -> Path:
    text = costs_file.dump(where.name, where.sm_count, changed or classes(), {})
    tuned.save(tuned.path_of(where), text)
    costs.forget()
    return tuned.path_of(where)


class TestBuiltIn:
    def test_every_variant_has_constants(self) -> None:
        name, sm_count, found = costs.built_in()
        assert (name, sm_count) == ("H200", gpu("H200").sm_count)
        assert {key: set(one.tflops_per_sm) for key, one in found.items()} == (
            costs_file.rows_by_class()
        )
        for variant in mla.variants():
            if not variant.on_host:
                assert costs.class_name(variant) in found
                assert variant.block_rows in costs.PEAK_SHARE[variant.pipeline]

    def test_a_dump_reads_back(self) -> None:
        text = costs_file.dump("some GPU", 7, classes(), {"date": "today"})
        assert costs_file.parse(text, costs_file.table_version()) == ("some GPU", 7, classes())


class TestDerived:
    @pytest.mark.parametrize("name", NEVER_MEASURED)
    def test_is_called_a_prediction(self, name: str) -> None:
        where = gpu(name)
        assert costs.of(where).source == "predicted from published figures; never measured here"
        assert costs.of(where).source in str(mla.explain(device=name))

    def test_unknown_gpus_go_by_their_sms(self) -> None:
        where = Device("NVIDIA GH200 480GB", "cuda", 90, 132, 227 << 10, 4800.0, 989.0)
        assert costs.of(where).source == "predicted from the number of SMs; never measured here"

    def test_slices_are_not_the_gpu(self) -> None:
        where = gpu("H200")
        part = Device("NVIDIA H200 MIG 1g.18gb", "cuda", 90, 16, 227 << 10, 600.0, 120.0)
        assert costs.of(where).source == "measured on an H200"
        assert costs.of(part).source.startswith("predicted")

    @pytest.mark.parametrize("name", NEVER_MEASURED)
    def test_never_better_than_published(self, name: str) -> None:
        where = gpu(name)
        peak = where.tflops / where.sm_count
        for found in costs.of(where).classes.values():
            assert 0.8 * where.bandwidth < found.bandwidth_gbs < 0.97 * where.bandwidth
            assert all(0 < rate < 0.81 * peak for rate in found.tflops_per_sm.values())

    def test_mma_rate_limits(self) -> None:
        """H20 has H200's memory and a seventh of its products."""
        slow, fast = costs.of(gpu("H20")).classes, classes()
        for key in fast:
            for rows, rate in fast[key].tflops_per_sm.items():
                assert slow[key].tflops_per_sm[rows] < rate
            assert slow[key].start_us == fast[key].start_us


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(key)


def with_value(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["classes"]["sm80.ampere_163k"].__setitem__(key, value)


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no format": (without("format"), r"format: got None, expected 4"),
    "another format": (lambda c: c.update(format=1), r"format: got 1, expected 4"),
    "other table": (lambda c: c.update(table="00"), r"table: got '00', expected '\w{8}'"),
    "no classes": (without("classes"), r"classes: got None, expected sm80"),
    "no GPU": (lambda c: c.update(gpu=3), r"gpu, sm_count: got 3, 132, expected a name"),
    "fewer classes": (lambda c: c["classes"].popitem(), r"classes: got sm80.*, expected sm80"),
    "a class of none": (
        lambda c: c["classes"].update({"sm80.ampere_163k": []}),
        r"sm80.ampere_163k: got \[\], expected start_us",
    ),
    "zero": (with_value("start_us", 0), r"start_us: got 0, expected a number above 0"),
    "below zero": (with_value("part_us", -1), r"part_us: got -1, expected a number, 0 or more"),
    "not finite": (with_value("merge_gbs", float("nan")), r"merge_gbs: got nan, expected"),
    "infinite": (with_value("merge_gbs", float("inf")), r"merge_gbs: got inf, expected"),
    "text": (with_value("start_us", "1"), r"start_us: got '1', expected"),
    "a huge integer": (with_value("start_us", 10**400), r"start_us: got 10+, expected"),
    "truth": (with_value("start_us", True), r"start_us: got True, expected"),
    "another field": (with_value("more", 1), r"sm80.ampere_163k: got .*more, expected"),
    "other rows": (
        with_value("tflops_per_sm", {"16": 1.0}),
        r"tflops_per_sm: got .*, expected rows \[16, 32, 64\]",
    ),
    "a bad rate": (
        with_value("tflops_per_sm", {"16": 1.0, "32": 0.0, "64": 1.0}),
        r"tflops_per_sm of 32: got 0.0, expected a number above 0",
    ),
}


class TestTunedFile:
    def test_goes_first(self) -> None:
        where = gpu("H200")
        slow = classes()
        slow["sm90_3wg.hopper"] = slow["sm90_3wg.hopper"]._replace(start_us=500.0)
        before = mla.explain(device=where, h_q=128, b=64).variant
        assert before is not None
        assert before.pipeline == "sm90_3wg"
        path = save(where, slow)
        dispatch.forget()
        told = mla.explain(device=where, h_q=128, b=64)
        assert told.costs == f"tuned on this GPU ({path})"
        assert told.variant is not None
        assert told.variant.pipeline == "sm90_2wg"
        assert dispatch.choose(told.problem, where, None) is told.variant

    def test_is_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reads: list[Device] = []
        monkeypatch.setattr(tuned, "load", reads.append)
        costs.forget()
        for _ in range(3):
            mla.explain(device="A100")
        assert len(reads) == 1

    def test_folders(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert tuned.folder() == tmp_path / "tuned"  # of all tests
        monkeypatch.delenv("MLA_TUNE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert tuned.folder() == tmp_path / "mla"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert tuned.folder() == Path.home() / ".cache" / "mla"
        odd = Device("NVIDIA GeForce RTX 4090/../x", "cuda", sm_count=128)
        assert tuned.path_of(odd).parent == tuned.folder()

    def test_of_another_gpu(self, caplog: pytest.LogCaptureFixture) -> None:
        a100, where = gpu("A100"), gpu("H200")
        path = save(a100)
        path.rename(tuned.path_of(where))
        costs.forget()
        assert costs.of(where).source == "measured on an H200"
        message = "got constants of A100 with 108 SMs, expected H200 with 132"
        assert message in caplog.text
        assert str(tuned.path_of(where)) in caplog.text

    def test_the_same_gpu_with_fewer_sms_has_its_own(self) -> None:
        where = gpu("H200")
        part = Device(where.name, "cuda", 90, 60, where.smem_optin, 2400.0, 450.0)
        save(where)
        assert costs.of(where).source.startswith("tuned")
        assert costs.of(part).source.startswith("predicted")

    @pytest.mark.parametrize("what", MALFORMED)
    def test_malformed(self, what: str, caplog: pytest.LogCaptureFixture) -> None:
        change, message = MALFORMED[what]
        where = gpu("H200")
        path = save(where)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            costs_file.parse(path.read_text(), costs_file.table_version())
        self.is_ignored(where, path, caplog)

    @pytest.mark.parametrize(
        "content", [b"", b"[1, 2", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 21)]
    )
    def test_not_such_a_file(self, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
        where = gpu("H200")
        path = save(where)
        path.write_bytes(content)
        self.is_ignored(where, path, caplog)

    def test_a_folder_in_its_place(self, caplog: pytest.LogCaptureFixture) -> None:
        where = gpu("H200")
        path = tuned.path_of(where)
        path.mkdir(parents=True)
        self.is_ignored(where, path, caplog)

    def is_ignored(self, where: Device, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        costs.forget()
        with caplog.at_level(logging.WARNING, logger="mla"):
            assert costs.of(where).source == "measured on an H200"
            costs.of(where)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"{path} is ignored" in record.getMessage()

    def test_a_write_that_fails_leaves_what_was_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save(gpu("H200"))
        before = path.read_text()

        def fail(self: Path, target: Path) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            tuned.save(path, "other")
        assert path.read_text() == before
        assert list(path.parent.iterdir()) == [path]

    def test_concurrent_writers(self) -> None:
        """Whoever reads meanwhile finds the whole of one of them."""
        path = save(gpu("H200"))
        texts = [str(i) * 200_000 for i in range(4)]
        context = multiprocessing.get_context("fork")
        writers = [context.Process(target=save_often, args=(path, text)) for text in texts]
        for writer in writers:
            writer.start()
        seen = set()
        while any(writer.is_alive() for writer in writers):
            seen.add(path.read_text())
        for writer in writers:
            writer.join()
            assert writer.exitcode == 0
        seen.add(path.read_text())
        assert len(seen & set(texts)) > 0
        assert all(text in texts or text.startswith("{") for text in seen)
        assert list(path.parent.iterdir()) == [path]


def save_often(path: Path, text: str) -> None:
    for _ in range(20):
        tuned.save(path, text)


def test_costs_need_no_import_time() -> None:
    """Nothing is read before a GPU is asked about."""
    costs.forget()
    costs.built_in.cache_clear()
    mla.explain(device="cpu")
    mla.info()
    assert costs.of.cache_info().currsize == 0
    assert costs.built_in.cache_info().currsize == 0


def test_facts_of_gpus_never_measured() -> None:
    """Published: SMs, GB/s, dense bf16 TFLOP/s with float32 accumulation, KB of shared memory."""
    published = {
        "A100": (108, 1555, 312, 163),
        "A100-SXM4-80GB": (108, 2039, 312, 163),
        "RTX 3090": (82, 936, 71, 99),
        "RTX 4090": (128, 1008, 165, 99),
        "RTX 5090": (170, 1792, 209, 99),
        "H20": (78, 4000, 148, 227),
        "H100": (132, 3352, 989, 227),
    }
    for name, (sms, bandwidth, tflops, smem) in published.items():
        facts = gpu(name)
        assert facts.name == name
        assert (facts.sm_count, facts.bandwidth, facts.tflops) == (sms, bandwidth, tflops)
        assert facts.smem_optin == smem * device.KIB


def test_overlap() -> None:
    assert _mla.overlapped(0, 0) == 0
    assert _mla.overlapped(3, 0) == _mla.overlapped(0, 3) == 3
    assert 3 < _mla.overlapped(3, 2.9) < 3.5
