"""The module against transformers' own attention, and the models' dimensions against theirs."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import mla
import pytest
import torch
from mla.layer_config import Dims, LayerConfig
from mla.models import MODELS
from mla.nn import MultiHeadLatentAttention
from mla.reference import errors
from paged_layer import Pages, exact_decode, randomise
from their_transformers import transformers
from torch import Tensor

YARN_V3 = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
YARN_V2 = YARN_V3 | {"mscale": 0.707, "mscale_all_dim": 0.707}
PLAIN = {"rope_type": "default", "rope_theta": 50000.0}
SMALL = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 24,
    "q_lora_rank": 48,
    "attn_implementation": "eager",
}
# Module, prefix of its classes, what differs from SMALL.
MODELS_OF_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", "DeepseekV2", {"rope_parameters": YARN_V2}),
    "v2-lite": (
        "deepseek_v2",
        "DeepseekV2",
        {"q_lora_rank": None, "rope_parameters": YARN_V2, "attention_bias": True},
    ),
    "v3": ("deepseek_v3", "DeepseekV3", {"rope_parameters": YARN_V3}),
    "v3-bias": (
        "deepseek_v3",
        "DeepseekV3",
        {"rope_parameters": PLAIN, "attention_bias": True, "qk_nope_head_dim": 128},
    ),
    "v3-halves": (
        "deepseek_v3",
        "DeepseekV3",
        {"rope_parameters": YARN_V3 | {"mscale": 2.0}, "rope_interleave": False},
    ),
    "glm": ("glm4_moe_lite", "Glm4MoeLite", {"rope_parameters": PLAIN, "v_head_dim": 256}),
    "minicpm3": (
        "minicpm3",
        "MiniCPM3",
        {
            "kv_lora_rank": 256,
            "qk_rope_head_dim": 32,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1 + i / 10 for i in range(16)],
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 32768,
            },
        },
    ),
    "mistral4": (
        "mistral4",
        "Mistral4",
        {
            "kv_lora_rank": 256,
            "rope_parameters": YARN_V3
            | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1},
        },
    ),
    "longcat": ("longcat_flash", "LongcatFlash", {"rope_parameters": PLAIN}),
    "youtu": ("youtu", "Youtu", {"rope_parameters": PLAIN}),
}
# Relative RMSE and WMAPE. transformers rounds cos and sin, keys and values of heads, and
# probabilities to the module's dtype; both round products, and the norms. float64: both compute
# norms or rotations, and transformers the softmax, in float32.
TOLERANCE = {torch.float64: 2e-6, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def theirs(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """An attention module and the rotary embedding of its model."""
    module, prefix, changes = MODELS_OF_TRANSFORMERS[name]
    modelling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = getattr(transformers, f"{prefix}Config")(**SMALL | changes)
    kind = getattr(modelling, f"{prefix}MLA", None) or getattr(modelling, f"{prefix}Attention")
    attention = kind(config, layer_idx=0).to(dtype).eval()
    randomise(attention)
    return attention, getattr(modelling, f"{prefix}RotaryEmbedding")(config)


@torch.no_grad()
def expected(attention: Any, rotary: Any, hidden: Tensor) -> Tensor:
    b, n, _ = hidden.shape
    positions = torch.arange(n)[None].expand(b, n)
    mask = torch.full((n, n), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
    out: Tensor = attention(
        hidden_states=hidden,
        position_embeddings=rotary(hidden, positions),
        attention_mask=mask[None, None].expand(b, 1, n, n),
        position_ids=positions,
    )[0]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", MODELS_OF_TRANSFORMERS)
def test_same_as_their_attention(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three steps: un-absorbed, absorbed, and absorbed with merged weights."""
    attention, rotary = theirs(name, dtype)
    hidden = torch.randn(2, 30, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = expected(attention, rotary, hidden)
    layer = MultiHeadLatentAttention.from_transformers(attention)
    assert layer.o_proj.weight.data_ptr() == attention.o_proj.weight.data_ptr()
    assert all(p.requires_grad for p in attention.parameters())

    def check(got: Tensor) -> None:
        found, most = errors(got, want), TOLERANCE[dtype]
        assert found.relative_rmse < most, str(found)
        assert found.wmape < most, str(found)
        assert found.cosine_distance < most**2 / 2, str(found)
        assert found.mse < most**2 / 2, str(found)  # of outputs of about N(0, 0.7)

    def steps(**options: Any) -> Tensor:
        pages = Pages(layer, 2, 30)
        return torch.cat([pages.step(layer, x, **options) for x in hidden.split([17, 5, 8], 1)], 1)

    if dtype != torch.float64:
        check(steps(method="expanded"))
    if dtype in (torch.float32, torch.float64):
        monkeypatch.setattr("mla.nn.decode", exact_decode)
    check(steps(method="absorbed"))
    layer.merge_weights()
    check(steps(method="absorbed"))


@pytest.mark.parametrize("name", MODELS_OF_TRANSFORMERS)
def test_scale_is_theirs(name: str) -> None:
    attention, _ = theirs(name, torch.float32)
    config = LayerConfig.from_transformers(attention.config)
    assert config.softmax_scale == pytest.approx(attention.scaling, rel=1e-12)


@pytest.mark.parametrize("name", MODELS_OF_TRANSFORMERS)
def test_angles_are_theirs(name: str) -> None:
    """Their float32 angles are off by position * 6e-8."""
    attention, rotary = theirs(name, torch.float32)
    config = LayerConfig.from_transformers(attention.config)
    assert config.rotary is not None
    places = torch.tensor([[0, 1, 17, 300]])
    table = config.rotary.table(config.rope, 301)[places[0]]
    angles = rotary(torch.zeros(1, dtype=torch.float32), places)
    if isinstance(angles, Tensor):
        want = torch.cat((angles.real, angles.imag), -1)[0]
    else:
        half = config.rope // 2
        want = torch.cat([part[0, :, :half] for part in angles], -1)
    torch.testing.assert_close(table, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DeepSeek-V3", "DeepseekV3Config"),
        ("GLM-4.7-Flash", "Glm4MoeLiteConfig"),
        ("MiniCPM3-4B", "MiniCPM3Config"),
        ("Mistral-Small-4", "Mistral4Config"),
        ("LongCat-Flash", "LongcatFlashConfig"),
        ("Kimi-Linear-48B", "KimiLinearConfig"),
        ("A.X-K1", "AXK1Config"),
        ("Youtu-LLM", "YoutuConfig"),
    ],
)
def test_dims_are_those_of_their_defaults(name: str, config: str) -> None:
    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    found = LayerConfig.from_transformers(getattr(transformers, config)())
    for field in fields(Dims):
        assert getattr(found, field.name) == getattr(MODELS[name], field.name), field.name


def test_sparse_models_are_refused() -> None:
    if not hasattr(transformers, "GlmMoeDsaConfig"):
        pytest.skip("this transformers has no GlmMoeDsaConfig")
    with pytest.raises(mla.UnsupportedError, match="model_type"):
        LayerConfig.from_transformers(transformers.GlmMoeDsaConfig())
