"""The device's planners on the CPU: the schedules of the host, and harmless where that has none.

kernels/common/plan.cu and plan_parts.cu run unchanged in a stand-in for a CTA (plan_on_cpu.cpp),
under AddressSanitizer and UndefinedBehaviorSanitizer where the compiler's work.
"""

from __future__ import annotations

import os
import subprocess
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
from compiler import HERE, compile_cpp
from device_plan import (
    OVERLAPPING,
    OVERLAPPING_PARTIALS,
    OVERLAPPING_PIECES,
    SHAPES,
    Batch,
    DevicePlan,
    Shape,
    batches,
    host_schedule,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schedule_checks import Schedule
from test_schedule import lengths

SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# It does not know the stacks of the stand-in's threads; leaks are not looked for.
SANITIZER_ENV = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}

drawn = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def sanitizers_work(folder: Path) -> bool:
    source, program = folder / "nothing.cpp", folder / "nothing"
    source.write_text("int main() {}\n")
    with suppress(subprocess.CalledProcessError):
        compile_cpp(source, program, *SANITIZERS)
        subprocess.run([program], check=True, env=os.environ | SANITIZER_ENV)
        return True
    return False


class Planner:
    """The program of plan_on_cpu.cpp, asked batch by batch. Where it ended it is started again."""

    def __init__(self, folder: Path) -> None:
        self.program, self.errors = folder / "plan_on_cpu", folder / "errors"
        self.process: subprocess.Popen[bytes] | None = None
        options = SANITIZERS if sanitizers_work(folder) else []
        compile_cpp(HERE / "plan_on_cpu.cpp", self.program, "-O1", *options)

    def start(self) -> subprocess.Popen[bytes]:
        with self.errors.open("wb") as errors:
            return subprocess.Popen(
                [self.program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | SANITIZER_ENV,
            )

    def plan(
        self,
        batch: Batch,
        shape: Shape,
        workers: int,
        backward: bool,
        batch_invariant: bool,
        large: bool = False,
    ) -> DevicePlan:
        """What it writes; `backward`: threads run last to first; `large`: as for large batches."""
        if self.process is None:
            self.process = self.start()
        cuts = batch.cu_seqlens_q
        sizes = [len(batch.seq_lens), cuts is not None, batch.s_q, batch.total_q, batch.h_q]
        modes = [batch_invariant, large, backward]
        request = [*sizes, batch.max_len, *shape, workers, *modes, *batch.seq_lens, *(cuts or [])]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(array("i", request).tobytes())
            self.process.stdin.flush()
        size = int.from_bytes(self.process.stdout.read(8), "little")
        words = array("i", self.process.stdout.read(size))
        if size == 0 or len(words) * 4 < size:
            self.stop()
            raise AssertionError(f"{batch}: the planner ended\n{self.errors.read_text()}")
        return DevicePlan(words, batch, shape, workers, batch_invariant)

    def stop(self) -> None:
        if self.process is not None:
            with suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None

    def check(self, batch: Batch, shape: Shape, workers: int, backward: bool) -> None:
        """In both modes: it stays inside, and it is the host's schedule where there is one."""
        for batch_invariant, large in product((False, True), (False, True)):
            plan = self.plan(batch, shape, workers, backward, batch_invariant, large)
            plan.check_inside()
            try:
                host = host_schedule(batch, shape, workers, batch_invariant)
            except ValueError:  # makes more pieces than a plan has room for
                assert batch.cuts is not None
            else:
                plan.check_is(host)
            if batch.cuts is None:
                Schedule(plan.as_made(), batch, shape, workers, batch_invariant).check()


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    made = Planner(tmp_path_factory.mktemp("planner"))
    yield made
    made.stop()


# Of every batch: the variant's tile, workers, and in which order the threads run.
settings_of_a_plan = st.tuples(
    st.sampled_from(list(SHAPES)), st.sampled_from([1, 2, 3, 7, 8, 82, 132]), st.booleans()
)
heads = st.sampled_from([1, 6, 16, 20, 128])
max_lens = st.sampled_from([2**31 - 1, 2**17, 777])


@pytest.mark.parametrize("workers", [1, 7, 132])
def test_ordinary_and_extreme_batches(planner: Planner, workers: int) -> None:
    for i, batch in enumerate(batches()):
        shape = list(SHAPES)[(i + workers) % len(SHAPES)]
        planner.check(batch, shape, workers, backward=bool(i // len(SHAPES) % 2))


@drawn
@given(st.lists(lengths, max_size=150), st.integers(0, 9), heads, max_lens, settings_of_a_plan)
def test_uniform_queries(
    planner: Planner,
    seq_lens: list[int],
    s_q: int,
    h_q: int,
    max_len: int,
    how: tuple[Shape, int, bool],
) -> None:
    planner.check(Batch(seq_lens, s_q, h_q, max_len), *how)


@drawn
@given(
    st.lists(st.tuples(lengths, st.integers(0, 20)), max_size=150),
    heads,
    max_lens,
    settings_of_a_plan,
)
def test_ragged_queries(
    planner: Planner,
    requests: list[tuple[int, int]],
    h_q: int,
    max_len: int,
    how: tuple[Shape, int, bool],
) -> None:
    seq_lens = [length for length, _ in requests]
    planner.check(Batch(seq_lens, [tokens for _, tokens in requests], h_q, max_len), *how)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"r{shape[0]}_n{shape[1]}")
@pytest.mark.parametrize(("name", "workers"), [("nonsense", 7), ("all or nothing", 132)])
def test_more_pieces_than_there_is_room_for(
    planner: Planner, name: str, workers: int, shape: Shape, backward: bool
) -> None:
    with pytest.raises(ValueError, match="too many pieces"):
        host_schedule(OVERLAPPING[name], shape, workers)
    planner.check(OVERLAPPING[name], shape, workers, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"r{shape[0]}_n{shape[1]}")
def test_more_parts_than_there_is_room_for(planner: Planner, shape: Shape, backward: bool) -> None:
    found = [OVERLAPPING_PIECES, *([OVERLAPPING_PARTIALS] if shape[0] == 64 else [])]
    for batch in found:
        with pytest.raises(ValueError, match="too many pieces"):
            host_schedule(batch, shape, 132, True)
        planner.check(batch, shape, 132, backward)


def test_more_items_than_32_bits_count(planner: Planner) -> None:
    pairs, total_q = 20_000, 13_500
    cuts = [0, total_q] * pairs + [0]
    batch = Batch([1] * (2 * pairs), [total_q] + [0] * (2 * pairs - 1), 128, cuts=cuts)
    assert pairs * total_q * batch.h_q // 16 > 2**31
    for batch_invariant in (False, True):
        planner.plan(batch, (16, 64, True), 1, False, batch_invariant).check_inside()


@st.composite
def wrong_batches(draw: st.DrawFn) -> Batch:
    """What cu_seqlens_q holds has nothing to do with the query: nonsense, or all or nothing."""
    requests = draw(st.integers(1, 100))
    total_q = draw(st.integers(1, 60))
    near = st.integers(-10, total_q + 20)
    cut = draw(
        st.sampled_from([near, st.sampled_from([0, total_q]), st.integers(-(2**31), 2**31 - 1)])
    )
    length = draw(st.sampled_from([lengths, st.integers(-100, 5000), st.just(1000)]))
    return Batch(
        draw(st.lists(length, min_size=requests, max_size=requests)),
        [total_q, *[0] * (requests - 1)],
        draw(heads),
        draw(max_lens),
        draw(st.lists(cut, min_size=requests + 1, max_size=requests + 1)),
    )


@drawn
@given(wrong_batches(), settings_of_a_plan)
@example(OVERLAPPING["nonsense"], ((16, 32, True), 132, False))
# One item more in several parts than a plan has room for.
@example(
    Batch([500_000, 0] * 3, [38] + [0] * 5, 16, cuts=[0, 38, 0, 38, 0, 38, 0]),
    ((16, 16, False), 1, False),
)
# The last place for a piece falls to an item that begins with a group, and stays unused.
@example(Batch([1000] * 3, [100, 0, 0], 6, cuts=[0, 100, 0, 100]), ((16, 64, False), 7, False))
def test_wrong_cu_seqlens_q_is_harmless(
    planner: Planner, batch: Batch, how: tuple[Shape, int, bool]
) -> None:
    planner.check(batch, *how)
