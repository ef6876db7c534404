"""The module: both graphs, in steps, against each other and against float64 from the equations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from mla import reference
from mla.checkpoint import attention_weights
from mla.layer_config import LayerConfig
from mla.nn import MultiHeadLatentAttention
from mla.rope import Rotary, Yarn, rotate
from paged_layer import Pages, exact_decode, randomise
from torch import Tensor

YARN = Yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0)
V3 = LayerConfig(
    hidden=96, heads=4, q_lora=48, kv_lora=512, nope=32, rope=64, v=24, rotary=Rotary(yarn=YARN)
)
CONFIGS = {
    "v3": V3,
    "v2-lite": replace(V3, q_lora=None),
    "halves": replace(V3, rotary=Rotary(interleaved=False, theta=500.0)),
    "nope": replace(V3, rotary=None),
    "no-rope-columns": replace(V3, rotary=None, rope=0),
    "bias": replace(V3, bias=True),
    "gains": replace(V3, q_gain=2.0, latent_gain=0.5),
    "growth": replace(V3, query_growth=0.3, query_growth_positions=7),
    "mistral": replace(V3, kv_lora=256, heads=5, scale=0.2),
    "minicpm": replace(V3, kv_lora=256, rope=32),
}
each_config = pytest.mark.parametrize("name", CONFIGS)
# Relative RMSE: the tolerances of one attention (tests/prefilling.py), more for the projections.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def make_layer(config: LayerConfig, dtype: torch.dtype, **options: Any) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(config, dtype=dtype, **options)
    randomise(layer)
    return layer


def equations(layer: MultiHeadLatentAttention, hidden: Tensor) -> Tensor:
    """DeepSeek-V2, arXiv 2405.04434, equations 37 to 47, in float64, for requests from their
    first token; hidden [b, n, hidden]."""
    c, w = layer.config, {k: v.double() for k, v in layer.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(name: str, x: Tensor, gain: float) -> Tensor:
        rms = (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return x / rms * w[f"{name}.weight"] * gain

    outputs = []
    for x in hidden.double():
        n = len(x)
        if c.q_lora is None:
            q = linear("q_proj", x)
        else:
            q = linear("q_b_proj", norm("q_a_layernorm", linear("q_a_proj", x), c.q_gain))
        q = q.view(n, c.heads, c.head_dim)
        growth = [1 + c.query_growth * math.log1p(i // c.query_growth_positions) for i in range(n)]
        q = q * torch.tensor(growth).double()[:, None, None]
        rows = linear("kv_a_proj_with_mqa", x)
        latent = norm("kv_a_layernorm", rows[:, : c.kv_lora], c.latent_gain)
        q_rope, k_rope = q[..., c.nope :], rows[:, c.kv_lora :]
        if c.rotary is not None:
            table = c.rotary.table(c.rope, n).double()
            q_rope = rotate(q_rope, table[:, None], interleaved=c.rotary.interleaved)
            k_rope = rotate(k_rope, table, interleaved=c.rotary.interleaved)
        by_head = w["kv_b_proj.weight"].view(c.heads, c.nope + c.v, c.kv_lora)
        out, _ = reference.attend_expanded(
            q[..., : c.nope],
            q_rope,
            latent,
            k_rope,
            by_head[:, : c.nope],
            by_head[:, c.nope :],
            scale=c.softmax_scale,
        )
        outputs.append(linear("o_proj", out.flatten(1)))
    return torch.stack(outputs)


def check(got: Tensor, want: Tensor) -> None:
    found = reference.errors(got, want)
    assert found.relative_rmse < TOLERANCE[got.dtype], str(found)


@each_config
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompt_and_steps(name: str, dtype: torch.dtype, merged: bool) -> None:
    """Two requests: 21 tokens un-absorbed, 3 at once absorbed, then one by one with a plan."""
    layer = make_layer(CONFIGS[name], dtype)
    if merged:
        layer.merge_weights()
    hidden = torch.randn(2, 27, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = equations(layer, hidden)
    pages = Pages(layer, 2, 27)
    got = [pages.step(layer, hidden[:, :21], method="expanded")]
    got.append(pages.step(layer, hidden[:, 21:24], method="absorbed"))
    for i in range(24, 27):
        plan = mla.plan(
            pages.lens + 1, h_q=layer.config.heads, d_qk=layer.config.d_qk, dtype=dtype,
            page_size=16, max_pages=pages.table.shape[1],
        )  # fmt: skip
        got.append(pages.step(layer, hidden[:, i : i + 1], plan=plan))
    check(torch.cat(got, 1), want)


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_more_precision(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed and merged, with the reference in the place of decode; un-absorbed in float32."""
    monkeypatch.setattr("mla.nn.decode", exact_decode)
    layer = make_layer(CONFIGS[name], dtype)
    hidden = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = equations(layer, hidden)

    def steps(method: str) -> Tensor:
        pages = Pages(layer, 2, 20)
        return torch.cat([pages.step(layer, x, method=method) for x in hidden.split([13, 7], 1)], 1)

    check(steps("absorbed"), want)
    if dtype == torch.float32:
        check(steps("expanded"), want)
    layer.merge_weights()
    check(steps("absorbed"), want)


def test_ragged_tokens() -> None:
    layer = make_layer(V3, torch.bfloat16)
    hidden = torch.randn(2, 12, 96).bfloat16()
    want = equations(layer, hidden)
    pages = Pages(layer, 2, 12)
    lens = [0, 0]
    for counts in ((5, 9), (1, 0), (6, 3)):
        rows = [hidden[i, lens[i] : lens[i] + n] for i, n in enumerate(counts)]
        places = [torch.arange(lens[i], lens[i] + n) for i, n in enumerate(counts)]
        lens = [length + n for length, n in zip(lens, counts, strict=True)]
        out = layer(
            torch.cat(rows),
            torch.cat(places).int(),
            pages.kv,
            pages.table,
            torch.tensor(lens, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32),
        )
        ends = [want[i, lens[i] - n : lens[i]] for i, n in enumerate(counts)]
        check(out, torch.cat(ends))


def test_many_tokens_absorbed_take_steps() -> None:
    layer = make_layer(V3, torch.bfloat16)
    hidden = torch.randn(2, 40, 96).bfloat16()
    got = [
        Pages(layer, 2, 40).step(layer, hidden, method="absorbed", workspace_bytes=n)
        for n in (16 * 4 * 2100, 1 << 30)
    ]
    torch.testing.assert_close(*got, atol=2e-2, rtol=2e-2)
    check(got[0], equations(layer, hidden))


def test_positions_without_a_place() -> None:
    """They change nothing of other tokens, on either side of the table of angles."""
    layer = make_layer(V3, torch.bfloat16, max_positions=30)
    hidden = torch.randn(1, 3, 96).bfloat16()
    pages = Pages(layer, 1, 40)
    lens = torch.tensor([1], dtype=torch.int32)
    positions = torch.tensor([[-1, 0, 30]], dtype=torch.int32)
    layer(hidden, positions, pages.kv, pages.table, lens)
    assert int(pages.kv.isfinite().sum()) == layer.config.d_qk


def test_a_plan_is_for_absorbed_steps() -> None:
    layer = make_layer(V3, torch.bfloat16)
    pages = Pages(layer, 1, 8)
    plan = mla.plan(pages.lens + 1, h_q=4, d_qk=576, dtype=torch.bfloat16, page_size=16)
    hidden = torch.randn(1, 1, 96).bfloat16()
    with pytest.raises(ValueError, match=r"^plan: got a plan of mla.plan, expected None with"):
        pages.step(layer, hidden, plan=plan, method="expanded")


@pytest.mark.parametrize("method", ["absorbed", "expanded", None])
@pytest.mark.parametrize(("b", "s"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(b: int, s: int, method: Any) -> None:
    layer = make_layer(V3, torch.bfloat16)
    pages = Pages(layer, b, 8)
    hidden = torch.empty(b, s, 96, dtype=torch.bfloat16)
    assert pages.step(layer, hidden, method=method).shape == hidden.shape
    assert not pages.kv.isfinite().any()


def prefill_plan(layer: MultiHeadLatentAttention, pages: Pages, s: int) -> mla.PrefillPlan:
    return mla.plan_prefill(
        pages.table, pages.lens + s, dims=layer.config, dtype=torch.bfloat16,
        num_pages=len(pages.kv), page_size=16, s=s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": None}, TypeError, "hidden: got NoneType, expected a torch.Tensor"),
        (
            {"hidden": torch.zeros(2, 3, 96)},
            TypeError,
            "hidden: got torch.float32, expected torch.bfloat16 as the layer has",
        ),
        (
            {"hidden": torch.zeros(2, 3, 95).bfloat16()},
            ValueError,
            r"hidden: got shape \[2, 3, 95\], expected \[b, s, 96\]$",
        ),
        (
            {"hidden": torch.zeros(6, 96).bfloat16()},
            ValueError,
            r"hidden: got shape \[6, 96\], expected \[b, s, 96\]$",
        ),
        (
            {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"hidden: got shape \[2, 3, 96\], expected \[tokens, 96\] with cu_seqlens_q$",
        ),
        (
            {"hidden": torch.zeros(2, 3, 96, dtype=torch.bfloat16, device="meta")},
            ValueError,
            "hidden: got device meta, expected cpu as the layer$",
        ),
        ({"seq_lens": None}, TypeError, "seq_lens: got NoneType, expected a torch.Tensor"),
        (
            {"seq_lens": torch.full((3,), 3, dtype=torch.int32)},
            ValueError,
            r"seq_lens: got shape \[3\], expected \[2\]",
        ),
        ({"method": "both"}, ValueError, "method: got 'both', expected 'absorbed', 'expanded' or"),
        ({"workspace_bytes": 0}, ValueError, r"workspace_bytes: got 0, expected 1 to 2\^31 - 1"),
        (
            {"method": "expanded", "variant": "cpu"},
            ValueError,
            "variant: got 'cpu', expected None with method 'expanded'",
        ),
        ({"plan": 5}, TypeError, "plan: got int, expected an mla.Plan or an mla.PrefillPlan"),
    ],
)
def test_wrong_calls_write_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = make_layer(V3, torch.bfloat16)
    pages = Pages(layer, 2, 8)
    call = {
        "hidden": torch.zeros(2, 3, 96).bfloat16(),
        "positions": torch.arange(3, dtype=torch.int32).expand(2, 3),
        "kv_cache": pages.kv,
        "block_table": pages.table,
        "seq_lens": torch.full((2,), 3, dtype=torch.int32),
    }
    assert layer(**call).shape == (2, 3, 96)
    pages.kv.fill_(torch.nan)
    with pytest.raises(error, match="^" + message):
        layer(**call | changes)
    assert not pages.kv.isfinite().any()


@pytest.mark.parametrize("option", [{"method": "absorbed"}, {"variant": "cpu"}])
def test_a_plan_of_a_prefill_decides_alone(option: dict[str, Any]) -> None:
    layer = make_layer(V3, torch.bfloat16)
    pages = Pages(layer, 1, 8)
    plan = prefill_plan(layer, pages, 3)
    with pytest.raises(ValueError, match=r"^plan: got a plan of mla.plan_prefill, expected None"):
        pages.step(layer, torch.zeros(1, 3, 96).bfloat16(), plan=plan, **option)
    assert not pages.kv.isfinite().any()


def test_only_attention_is_taken_over() -> None:
    with pytest.raises(TypeError, match=r"^attention: got Linear, expected an MLA of transformers"):
        MultiHeadLatentAttention.from_transformers(torch.nn.Linear(2, 2))


def test_checkpoints_load() -> None:
    layer = make_layer(V3, torch.bfloat16)
    names = {f"model.layers.3.self_attn.{k}": v for k, v in layer.state_dict().items()}
    other = MultiHeadLatentAttention(V3, dtype=torch.bfloat16)
    other.load_state_dict(attention_weights(names, 3))
    hidden = torch.randn(1, 5, 96).bfloat16()
    outs = [Pages(each, 1, 5).step(each, hidden) for each in (layer, other)]
    assert torch.equal(*outs)
    assert not any(p.requires_grad for p in layer.parameters())


def test_angles_stay_float32() -> None:
    layer = MultiHeadLatentAttention(V3, device="meta").bfloat16()
    layer.to_empty(device="cpu")
    assert layer.cos_sin is not None
    table = layer.cos_sin
    assert layer.o_proj.weight.dtype == torch.bfloat16
    assert torch.equal(table, Rotary(yarn=YARN).table(64, 4096))
    assert layer.half().cos_sin is table
    assert layer.o_proj.weight.dtype == torch.float16


def test_layers_share_a_table() -> None:
    table = Rotary(yarn=YARN).table(64, 100)
    layers = [MultiHeadLatentAttention(V3, cos_sin=table) for _ in range(2)]
    assert layers[0].cos_sin is layers[1].cos_sin is table
    assert "cos_sin" not in layers[0].state_dict()
