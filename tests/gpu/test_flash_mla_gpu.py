"""mla.compat.flash_mla on a GPU: numerics, graphs in both forms, no waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flash_mla_calls import FORMS, Call, check_call, make, metadata, run
from mla.compat import flash_mla
from running import MOST, NAN, STEPS
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")

CALLS = [
    Call((4096, 20, 140)),
    Call((4096, 20, 140), h_q=128, s_q=2, causal=True),
    Call((4096, 20, 140), h_q=128, s_q=2),
    Call((1000, 0, 65, 1), h_q=63, s_q=4, causal=True),
    Call((1000, 0, 65, 1), h_q=1),
    Call((1000, 0, 65, 1), h_q=9, h_kv=3, s_q=4, causal=True),
    Call((1000, 0, 65, 1), h_q=128, h_kv=8, s_q=2, dtype=torch.float16),
    Call((0, 0), h_q=16),
    Call((2, 1), s_q=4, causal=True),
    Call((900, 170), page_size=1),
    Call((900, 170), page_size=128, h_kv=2, h_q=32),
    Call((900, 170), d_qk=512),
    Call((900, 170), d_qk=320, d_v=256),
    Call(tuple(range(0, 6400, 50)), h_q=126, s_q=2, causal=True),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_matches_the_reference(
    call: Call, form: str, device: torch.device, launches: list[str]
) -> None:
    tensors = make(call, device)
    check_call(tensors, run(tensors, form))
    assert len(launches) == call.h_kv


@pytest.mark.parametrize("form", FORMS)
def test_does_not_wait(form: str, device: torch.device) -> None:
    tensors = make(Call((300, 40), h_q=8, h_kv=2, s_q=2, causal=True), device)
    run(tensors, form)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run(tensors, form)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_call(tensors, result)


@pytest.mark.parametrize("made", ["inside", "outside", "outside and used before"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("h_kv", [1, 2])
def test_replay_follows_the_lengths(form: str, made: str, h_kv: int, device: torch.device) -> None:
    """Two layers of a step, captured at the shortest lengths. Then the same metadata without a
    graph, which must not rely on what only a replay writes."""
    first = make(Call(MOST, s_q=2, h_kv=h_kv, causal=True), device)
    other = make(first.call, device, seed=1)
    layers = (first, replace(other, cache_seqlens=first.cache_seqlens))
    first.cache_seqlens.copy_(torch.tensor(STEPS[0], dtype=torch.int32))
    kept = metadata(first, form)

    def step(scheduler: tuple[object, object]) -> list[tuple[Tensor, Tensor]]:
        return [
            flash_mla.flash_mla_with_kvcache(*layer.arguments(), *scheduler, causal=True)  # type: ignore[arg-type]
            for layer in layers
        ]

    if made == "outside and used before":
        step(kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(metadata(first, form) if made == "inside" else kept)
    for lengths in (*STEPS, *reversed(STEPS)):
        first.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for tensor in (t for result in results for t in result):
            tensor.fill_(NAN)
        graph.replay()
        for layer, result in zip(layers, results, strict=True):
            check_call(layer, result)
    for layer, result in zip(layers, step(kept), strict=True):
        check_call(layer, result)


@pytest.mark.parametrize("made", ["outside", "outside and used before"])
def test_a_graph_needs_no_metadata_after_its_capture(made: str, device: torch.device) -> None:
    """What it writes and reads at a replay is its own, once the caller has dropped the object."""
    tensors = make(Call(MOST, s_q=2, causal=True), device)
    kept = metadata(tensors, "new")
    if made == "outside and used before":
        flash_mla.flash_mla_with_kvcache(*tensors.arguments(), *kept, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flash_mla.flash_mla_with_kvcache(*tensors.arguments(), *kept, causal=True)
    del kept
    torch.cuda.synchronize()
    others = [torch.full((1 << 14,), 0x7F, dtype=torch.uint8, device=device) for _ in range(2000)]
    graph.replay()
    check_call(tensors, result)
    assert all(bool((other == 0x7F).all()) for other in others), "the graph wrote to them"
