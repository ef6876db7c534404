"""Weights: absorption, softmax scales, dimensions, configurations and checkpoints."""

from __future__ import annotations

import cmath
import math
from typing import Any

import mla
import pytest
import torch
from mla.absorb import absorb_query, expand_output, split_kv_b
from mla.checkpoint import attention_weights
from mla.layer_config import Dims, LayerConfig
from mla.models import MODELS
from mla.reference import attend, attend_expanded
from mla.rope import Rotary, Yarn, rotate, softmax_scale, yarn_mscale
from torch import Tensor

SMALL = Dims(heads=3, q_lora=24, kv_lora=32, nope=16, rope=8, v=12)


def weights(dims: Dims, hidden: int = 40, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """w_q, w_kv_b, w_o."""
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)

    return [
        draw(dims.heads * dims.head_dim, dims.q_lora or hidden),
        draw(dims.heads * (dims.nope + dims.v), dims.kv_lora),
        draw(hidden, dims.heads * dims.v),
    ]


class TestAbsorb:
    def test_both_graphs_are_the_same_function(self) -> None:
        """Un-absorbed, with factors, and merged, in float64 and from the same input."""
        w_q, w_kv_b, w_o = weights(SMALL)
        merged = mla.absorb(w_q, w_kv_b, w_o, SMALL)
        assert merged.w_q.shape == (SMALL.heads * SMALL.d_qk, 24)
        assert merged.w_o.shape == (40, SMALL.heads * SMALL.kv_lora)
        x = torch.randn(5, 24, dtype=torch.float64)
        latent, rope = torch.randn(7, 32).double(), torch.randn(7, 8).double()
        w_uk, w_uv = split_kv_b(w_kv_b, SMALL)

        q = (x @ w_q.T).view(5, 3, 24)
        q_nope, q_rope = q[..., :16], q[..., 16:]
        want, lse = attend_expanded(q_nope, q_rope, latent, rope, w_uk, w_uv, scale=0.1)
        kv = torch.cat((latent, rope), -1)
        factored = torch.cat((absorb_query(q_nope, w_uk), q_rope), -1)
        packed = (x @ merged.w_q.T).view(5, 3, 40)
        torch.testing.assert_close(packed, factored)
        o_latent, absorbed_lse = attend(packed, kv, 32, scale=0.1)
        torch.testing.assert_close(absorbed_lse, lse)
        torch.testing.assert_close(expand_output(o_latent, w_uv), want)
        torch.testing.assert_close(o_latent.flatten(1) @ merged.w_o.T, want.flatten(1) @ w_o.T)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_products_are_rounded_once(self, dtype: torch.dtype) -> None:
        narrow = weights(SMALL, dtype=dtype)
        exact = mla.absorb(*(w.double() for w in narrow), SMALL)
        for got, want in zip(mla.absorb(*narrow, SMALL), exact, strict=True):
            assert got.dtype == dtype
            error = (got.double() - want).abs()
            # half a unit in the last place, and the sum of 16 or 12 products in float32
            unit = 2**-8 if dtype == torch.bfloat16 else 2**-11
            assert (error <= unit * want.abs() + 1e-5).all()
        assert mla.absorb(*narrow, SMALL, dtype=torch.float32).w_q.dtype == torch.float32

    @pytest.mark.parametrize("name", MODELS)
    def test_every_model(self, name: str) -> None:
        """Shapes, with the heads of one GPU."""
        model = MODELS[name]
        assert model.head_dim == model.nope + model.rope
        dims = Dims(
            heads=2,
            q_lora=16,
            kv_lora=model.kv_lora,
            nope=model.nope,
            rope=model.rope,
            v=model.v,
        )
        w_q, w_kv_b, w_o = weights(dims, dtype=torch.float32)
        merged = mla.absorb(w_q, w_kv_b, w_o, dims)
        x = torch.randn(3, 16)
        by_head = (x @ w_q.T).view(3, 2, model.head_dim)
        want = absorb_query(by_head[..., : model.nope], split_kv_b(w_kv_b, dims)[0])
        got = (x @ merged.w_q.T).view(3, 2, model.d_qk)
        torch.testing.assert_close(got[..., : model.kv_lora], want, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(got[..., model.kv_lora :], by_head[..., model.nope :])

    @pytest.mark.parametrize(
        ("index", "bad", "kind", "message"),
        [
            (0, None, TypeError, "w_q: got NoneType"),
            (0, torch.zeros(72, 24, dtype=torch.int32), TypeError, "w_q: got torch.int32"),
            (1, torch.zeros(84, 32).to(torch.float8_e4m3fn), TypeError, "w_kv_b: got torch.float8"),
            (0, torch.zeros(71, 24), ValueError, r"w_q: got shape \[71, 24\], expected \[72, any"),
            (1, torch.zeros(84, 31), ValueError, r"w_kv_b: got shape .* expected \[84, 32\] for 3"),
            (2, torch.zeros(40), ValueError, r"w_o: got shape \[40\], expected \[any, 36\]"),
            (2, torch.zeros(40, 36, device="meta"), ValueError, "w_o: got device meta"),
        ],
    )
    def test_wrong_weights(self, index: int, bad: Any, kind: type[Exception], message: str) -> None:
        given: list[Any] = weights(SMALL, dtype=torch.float32)
        given[index] = bad
        with pytest.raises(kind, match=f"^{message}"):
            mla.absorb(*given, SMALL)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"])
    def test_wrong_dtypes(self, dtype: Any) -> None:
        with pytest.raises(TypeError, match=f"^dtype: got {dtype}, expected a floating point"):
            mla.absorb(*weights(SMALL), SMALL, dtype=dtype)

    def test_wrong_dims(self) -> None:
        dims: Any = (3, 32)
        with pytest.raises(TypeError, match=r"^dims: got tuple, expected "):
            mla.absorb(*weights(SMALL), dims)


class TestScale:
    @pytest.mark.parametrize(
        ("name", "scale"),
        [
            ("DeepSeek-V2", 0.11472),
            ("DeepSeek-V2-Lite", 0.11472),
            ("DeepSeek-V3", 0.135234),
            ("Kimi-K2", 0.130861),
            ("Kimi-K2-0905", 0.144680),
            ("Moonlight-16B", 192**-0.5),
            ("Kimi-Linear-48B", 192**-0.5),
            ("LongCat-Flash", 192**-0.5),
            ("MiniCPM3-4B", 96**-0.5),
            ("GLM-4.7-Flash", 256**-0.5),
        ],
    )
    def test_of_models(self, name: str, scale: float) -> None:
        assert MODELS[name].scale == pytest.approx(scale, rel=5e-6 if scale > 0.12 else 5e-5)

    def test_without_yarn(self) -> None:
        assert softmax_scale(192) == 192**-0.5
        assert softmax_scale(192, yarn_factor=40) == 192**-0.5
        assert softmax_scale(192, yarn_factor=0.5, mscale_all_dim=1) == 192**-0.5
        assert yarn_mscale(1.0) == 1.0
        assert yarn_mscale(40.0) == pytest.approx(1.36889, abs=1e-5)


class TestRotate:
    @pytest.mark.parametrize("interleaved", [True, False])
    def test_turns_pairs_as_complex_numbers(self, interleaved: bool) -> None:
        rotary = Rotary(theta=100.0, interleaved=interleaved)
        x = torch.randn(6, 2, 8, dtype=torch.float64)
        got = rotate(x, rotary.table(8, 6)[:, None], interleaved=interleaved)
        for pair in range(4):
            first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
            for position in range(6):
                turn = cmath.exp(1j * position * 100.0 ** (-pair / 4))
                want = torch.complex(x[position, :, first], x[position, :, second]) * turn
                torch.testing.assert_close(got[position, :, first], want.real, atol=1e-6, rtol=0)
                torch.testing.assert_close(got[position, :, second], want.imag, atol=1e-6, rtol=0)

    def test_scores_depend_on_distance_alone(self) -> None:
        table = Rotary(yarn=Yarn(40, 4096)).table(64, 5000).double()
        q, k = torch.randn(64).double(), torch.randn(64).double()

        def score(at: int, of: int) -> float:
            turned = [rotate(x, table[i], interleaved=True) for x, i in ((q, at), (k, of))]
            return float(turned[0] @ turned[1])

        assert score(4711, 4700) == pytest.approx(score(11, 0), abs=1e-4)

    def test_yarn_keeps_fast_pairs_and_slows_the_others(self) -> None:
        plain = Rotary().frequencies(64)
        blended = Rotary(yarn=Yarn(40, 4096)).frequencies(64)
        torch.testing.assert_close(blended[:10], plain[:10])
        torch.testing.assert_close(blended[24:], plain[24:] / 40)
        assert (blended.diff() < 0).all()

    def test_factor_of_cos_and_sin(self) -> None:
        for yarn, factor in (
            (Yarn(40, 4096, mscale=0.707, mscale_all_dim=0.707), 1.0),
            (Yarn(40, 4096), 0.1 * math.log(40) + 1),
        ):
            table = Rotary(yarn=yarn).table(8, 3)
            assert table[0, 0] == pytest.approx(factor)
        assert Rotary(attention_factor=0.5).table(8, 1)[0, 0] == 0.5


CONFIG_V3 = {  # what config.json of DeepSeek-V3 says, of what matters
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


class TestConfig:
    def test_of_deepseek_v3(self) -> None:
        config = LayerConfig.from_transformers(CONFIG_V3)
        assert config.softmax_scale == pytest.approx(0.135234, abs=1e-6)
        assert (config.hidden, config.d_qk, config.d_v, config.head_dim) == (7168, 576, 512, 192)
        assert config.rotary == Rotary(
            yarn=Yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0), interleaved=True
        )
        assert config.rotary is not None
        assert config.rotary.table(64, 1)[0, 0] == 1

    def test_gains_of_longcat(self) -> None:
        config = LayerConfig.from_transformers(
            CONFIG_V3 | {"model_type": "longcat_flash", "hidden_size": 6144, "rope_scaling": None}
        )
        assert (config.q_gain, config.latent_gain) == (2.0, 12**0.5)

    def test_no_rotation_of_kimi_linear(self) -> None:
        assert (
            LayerConfig.from_transformers(CONFIG_V3 | {"model_type": "kimi_linear"}).rotary is None
        )

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            (
                {"model_type": "llama"},
                mla.UnsupportedError,
                "model_type: got 'llama', expected one",
            ),
            ({"index_topk": 2048}, mla.UnsupportedError, "index_topk: sparse"),
            ({"kv_lora_rank": None}, ValueError, "kv_lora_rank: got None in the configuration"),
            (
                {"rope_scaling": {"type": "linear", "factor": 2}},
                mla.UnsupportedError,
                "rope: got 'linear'",
            ),
            (
                {
                    "rope_scaling": {
                        "type": "longrope",
                        "original_max_position_embeddings": 4096,
                        "short_factor": [1.0] * 32,
                        "long_factor": [2.0] * 32,
                    }
                },
                mla.UnsupportedError,
                "rope: longrope with 163840 positions of originally 4096",
            ),
            (
                {"rope_scaling": {"type": "yarn"}, "max_position_embeddings": None},
                ValueError,
                "original_max_position_embeddings: got None in the configuration",
            ),
            (
                {
                    "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096},
                    "max_position_embeddings": None,
                },
                ValueError,
                "max_position_embeddings: got None in the configuration, expected a value",
            ),
            (
                {"rope_scaling": {"type": "longrope"}},
                ValueError,
                "short_factor: got None in the configuration, expected a value",
            ),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=f"^{message}"):
            LayerConfig.from_transformers(CONFIG_V3 | changes)


class TestCheckpoint:
    def test_names(self) -> None:
        checkpoint = {
            "model.layers.1.self_attn.kv_b_proj.weight": torch.ones(2, 2),
            "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.layers.11.self_attn.kv_b_proj.weight": torch.zeros(2, 2),
            "other.kv_b_proj.weight": torch.full((2, 2), 3.0),
        }
        (found,) = attention_weights(checkpoint, 1, dtype=torch.float16).items()
        assert found[0] == "kv_b_proj.weight"
        assert torch.equal(found[1], torch.ones(2, 2, dtype=torch.float16))
        assert attention_weights(checkpoint, "other.")["kv_b_proj.weight"].sum() == 12
        with pytest.raises(KeyError, match=r"model\.layers\.2\.self_attn"):
            attention_weights(checkpoint, 2)

    def test_blocks_of_8_bits(self) -> None:
        weight = (torch.randn(200, 300) * 8).to(torch.float8_e4m3fn)
        scales = torch.rand(2, 3)
        checkpoint = {
            "model.layers.0.self_attn.o_proj.weight": weight,
            "model.layers.0.self_attn.o_proj.weight_scale_inv": scales,
        }
        found = attention_weights(checkpoint, 0)
        assert list(found) == ["o_proj.weight"]
        assert found["o_proj.weight"].dtype == torch.bfloat16
        exact = attention_weights(checkpoint, 0, dtype=torch.float32)["o_proj.weight"]
        for row, column in ((0, 0), (127, 128), (128, 127), (199, 299)):
            want = weight.float()[row, column] * scales[row // 128, column // 128]
            assert exact[row, column] == want

    @pytest.mark.parametrize(
        ("scales", "got"),
        [
            ({}, "no scales"),
            ({"weight_scale": torch.ones(1)}, "no scales"),
            ({"weight_scale_inv": torch.ones(1)}, r"shape \[1\]"),
            ({"weight_scale_inv": torch.ones(3, 2)}, r"shape \[3, 2\]"),
        ],
    )
    def test_other_forms_of_8_bits(self, scales: dict[str, Tensor], got: str) -> None:
        """Without its scales a weight would be wrong without a word."""
        weight = torch.zeros(200, 300).to(torch.float8_e4m3fn)
        checkpoint = {"o_proj.weight": weight} | {f"o_proj.{k}": x for k, x in scales.items()}
        message = rf"^o_proj.weight: got torch.float8_e4m3fn with {got}, expected .* \[2, 3\]: one"
        with pytest.raises(ValueError, match=message):
            attention_weights(checkpoint, "")
