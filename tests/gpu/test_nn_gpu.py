"""The module on a GPU: the same as on a CPU, and a whole step in a graph."""

from __future__ import annotations

from typing import Any

import mla
import pytest
import torch
from mla.nn import MultiHeadLatentAttention
from paged_layer import Pages, randomise
from test_nn import CONFIGS, V3, check, equations

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


def make_layer(config: Any, dtype: torch.dtype, device: torch.device) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(config, dtype=dtype)
    randomise(layer)
    return layer.to(device)


@each_dtype
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompt_and_steps(
    name: str, merged: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """As on a CPU: un-absorbed, three tokens absorbed, then one by one with a plan."""
    layer = make_layer(CONFIGS[name], dtype, device)
    if merged:
        layer.merge_weights()
    hidden = torch.randn(2, 27, 96, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    want = equations(layer.cpu(), hidden.cpu()).to(device)
    layer.to(device)
    pages = Pages(layer, 2, 27)
    got = [pages.step(layer, hidden[:, :21], method="expanded")]
    got.append(pages.step(layer, hidden[:, 21:24], method="absorbed"))
    plan = mla.plan(
        pages.lens + 1, h_q=layer.config.heads, d_qk=layer.config.d_qk, dtype=dtype,
        page_size=16, max_pages=pages.table.shape[1],
    )  # fmt: skip
    for i in range(24, 27):
        plan.update(pages.lens + 1)
        got.append(pages.step(layer, hidden[:, i : i + 1], plan=plan))
    check(torch.cat(got, 1), want)


@each_dtype
def test_a_step_in_a_graph(dtype: torch.dtype, device: torch.device) -> None:
    """Captured once, replayed for each next token: positions, lengths and hidden change."""
    layer = make_layer(V3, dtype, device)
    hidden = torch.randn(3, 30, 96, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    want = equations(layer.cpu(), hidden.cpu()).to(device)
    layer.to(device)
    pages = Pages(layer, 3, 30)
    pages.step(layer, hidden[:, :20], method="expanded")
    now = hidden[:, 20:21].clone()
    positions = pages.lens[:, None].clone()
    lens = pages.lens + 1

    def step() -> torch.Tensor:
        return layer(now, positions, pages.kv, pages.table, lens)

    step()  # warms up; its token is written again below
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for i in range(20, 30):
        now.copy_(hidden[:, i : i + 1])
        positions.fill_(i)
        lens.fill_(i + 1)
        graph.replay()
        check(out, want[:, i : i + 1])
