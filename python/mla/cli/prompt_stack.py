"""What `mla bench --prompt` compares: layers over a latent cache, and torch's matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import softmax

import mla
from mla.layer_config import LayerConfig
from mla.models import MODELS
from mla.nn import MultiHeadLatentAttention
from mla.plan import Plan
from mla.prefill_plan import PrefillPlan
from mla.prefill_times import Method
from mla.projections import linear
from mla.rope import Rotary, Yarn, rotate

HIDDEN, PAGE_SIZE = 2048, 64
DTYPE = torch.bfloat16
Step: TypeAlias = Callable[[], Tensor]  # of all layers, as often as one likes


def lite_config() -> LayerConfig:
    """Of a layer of DeepSeek-V2-Lite."""
    d = MODELS["DeepSeek-V2-Lite"]
    yarn = Yarn(factor=40, original_positions=4096, mscale=0.707, mscale_all_dim=0.707)
    return LayerConfig(
        hidden=HIDDEN, heads=d.heads, kv_lora=d.kv_lora, nope=d.nope, rope=d.rope, v=d.v,
        rotary=Rotary(yarn=yarn),
    )  # fmt: skip


def make_layers(count: int, capacity: int, device: torch.device) -> list[MultiHeadLatentAttention]:
    """Random weights; one table of angles."""
    config = lite_config()
    assert config.rotary is not None
    table = config.rotary.table(config.rope, capacity, device)
    generator = torch.Generator(device).manual_seed(0)
    layers = [
        MultiHeadLatentAttention(config, cos_sin=table, device=device, dtype=DTYPE)
        for _ in range(count)
    ]
    for layer in layers:
        for weight in layer.parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.fill_(1)
    return layers


class Contender(Protocol):
    """A way to run the layers."""

    name: str

    def step(self, hidden: Tensor, depth: int, captured: bool = False) -> Step:
        """Of tokens [1, s, hidden] behind `depth` others, with all that the host does before; to
        be captured in a CUDA graph or not."""


class Paged:
    """Over a paged latent cache, all layers by one plan."""

    def __init__(
        self, name: str, layers: Sequence[MultiHeadLatentAttention], caches: Sequence[Tensor],
        table: Tensor, method: Method | None,
    ) -> None:  # fmt: skip
        self.name, self._layers, self._caches = name, layers, caches
        self._table, self._method = table, method

    def step(self, hidden: Tensor, depth: int, captured: bool = False) -> Step:
        s, device = hidden.shape[1], hidden.device
        length = depth + s
        table = self._table[:, : -(-length // PAGE_SIZE)]
        lens = torch.tensor([length], dtype=torch.int32, device=device)
        positions = torch.arange(depth, length, dtype=torch.int32, device=device)[None]
        plan = self._plan(table, lens, s, captured)

        def run() -> Tensor:
            x = hidden
            for layer, cache in zip(self._layers, self._caches, strict=True):
                x = x + layer(x, positions, cache, table, lens, plan=plan)
            return x

        return run

    def _plan(self, table: Tensor, lens: Tensor, s: int, captured: bool) -> Plan | PrefillPlan:
        dims, (num_pages, page_size, _) = self._layers[0].config, self._caches[0].shape
        plan = mla.plan_prefill(
            table, lens, dims=dims, dtype=DTYPE, num_pages=num_pages, page_size=page_size, s=s,
            method=self._method, captured=captured,
        )  # fmt: skip
        if plan.method != "absorbed":
            return plan
        return mla.plan(
            lens, h_q=dims.heads, d_qk=dims.d_qk, dtype=DTYPE, page_size=page_size, s_q=s,
            max_pages=table.shape[1],
        )  # fmt: skip


class Matmul:
    """Over keys and values of every head, by two matrix products with a softmax in float32 between
    them: how transformers does it where it has no other attention."""

    name = "matmul"

    def __init__(self, layers: Sequence[MultiHeadLatentAttention], capacity: int) -> None:
        self._layers, c = layers, layers[0].config
        device = layers[0].o_proj.weight.device
        self._caches = [
            torch.zeros(c.heads, capacity, c.head_dim + c.v, dtype=DTYPE, device=device)
            for _ in layers
        ]

    def step(self, hidden: Tensor, depth: int, captured: bool = False) -> Step:
        s, device = hidden.shape[1], hidden.device
        length = depth + s
        positions = torch.arange(depth, length, device=device)
        mask = torch.full((s, length), float("-inf"), dtype=DTYPE, device=device).triu_(depth + 1)

        def run() -> Tensor:
            x = hidden[0]
            for layer, cache in zip(self._layers, self._caches, strict=True):
                x = x + _matmul_layer(layer, x, positions, cache[:, :length], mask)
            return x[None]

        return run


def _matmul_layer(
    layer: MultiHeadLatentAttention, hidden: Tensor, positions: Tensor, cache: Tensor, mask: Tensor
) -> Tensor:
    """cache: [h, n, nope + rope + v], whose last rows are written to."""
    c, s = layer.config, len(hidden)
    assert c.rotary is not None
    assert layer.cos_sin is not None
    latent, k_rope = layer.latents(hidden)
    q_nope, q_rope = layer.queries(hidden, positions)
    assert k_rope is not None
    assert q_rope is not None
    new = layer.kv_b_proj(latent).view(s, c.heads, c.nope + c.v).transpose(0, 1)
    rows = cache[:, -s:]
    rows[..., : c.nope], rows[..., c.head_dim :] = new[..., : c.nope], new[..., c.nope :]
    rows[..., c.nope : c.head_dim] = rotate(
        k_rope, layer.cos_sin[positions], interleaved=c.rotary.interleaved
    )
    q = torch.cat((q_nope, q_rope), -1).transpose(0, 1)
    logits = torch.matmul(q, cache[..., : c.head_dim].transpose(1, 2)) * c.softmax_scale
    if s > 1:
        logits = logits + mask
    p = softmax(logits, -1, dtype=torch.float32).to(q.dtype)
    out = torch.matmul(p, cache[..., c.head_dim :]).transpose(0, 1)
    return linear(layer.o_proj, out.flatten(-2))
