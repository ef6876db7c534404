"""Sizes and numbers of a model's MLA layer, also from the configuration of a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedError
from .rope import Rotary, Yarn, softmax_scale

# What differs between models whose attention is otherwise that of DeepSeek-V3, by `model_type`.
# Any other model is refused: sparse selection, output gates and sliding windows would be missed.
_DEPARTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {},
    "deepseek_v3": {},
    "kimi_k2": {},
    "axk1": {},
    "glm4_moe_lite": {},
    "mistral4": {},
    "youtu": {},
    "minicpm3": {"interleaved": False},
    "longcat_flash": {"lora_gains": True, "theta": 1e7},
    "kimi_linear": {"rotated": False},
}


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Of one MLA layer. Under tensor parallelism `heads` are those of one GPU."""

    heads: int
    kv_lora: int  # c: latent columns of a cache row
    nope: int  # columns of a head's query that see no position
    rope: int  # columns of a head's query, and of a cache row, that are rotated
    v: int  # columns of a head's value
    q_lora: int | None = None  # None: the query comes from the hidden state by one product

    @property
    def head_dim(self) -> int:
        """Of a head before absorption, nope + rope: 192 for DeepSeek-V3."""
        return self.nope + self.rope

    @property
    def d_qk(self) -> int:
        """Of a head after absorption, and of a cache row: 576 for DeepSeek-V3."""
        return self.kv_lora + self.rope

    @property
    def d_v(self) -> int:
        """Of a head after absorption: what `decode` returns."""
        return self.kv_lora

    @property
    def dims(self) -> Dims:
        """What the attention itself depends on."""
        return Dims(
            heads=self.heads, kv_lora=self.kv_lora, nope=self.nope, rope=self.rope, v=self.v
        )


@dataclass(frozen=True, kw_only=True)
class LayerConfig(Dims):
    """A layer: `Dims`, and how it rotates, norms and scales.

    scale: of the softmax; None: from head_dim and `rotary` (rope.softmax_scale).
    rotary: None: nothing is rotated, although there may be rope columns.
    norm_eps: of the norms of query and latent: 1e-6 in the released code of all these models,
        whatever `rms_norm_eps` of their configurations says.
    bias: the projections from the hidden state (with q_lora) and to it have one.
    q_gain, latent_gain: the normed query and latent are multiplied by them (LongCat-Flash).
    query_growth, query_growth_positions: queries at position p are multiplied by
        1 + query_growth * ln(1 + p // query_growth_positions) (Llama 4, Mistral-Small-4).
    """

    hidden: int
    rotary: Rotary | None
    scale: float | None = None
    norm_eps: float = 1e-6
    bias: bool = False
    q_gain: float = 1.0
    latent_gain: float = 1.0
    query_growth: float = 0.0
    query_growth_positions: int = 1

    @property
    def softmax_scale(self) -> float:
        """`scale` of `decode` and `prefill`."""
        if self.scale is not None:
            return self.scale
        yarn = None if self.rotary is None else self.rotary.yarn
        if yarn is None:
            return softmax_scale(self.head_dim)
        return softmax_scale(
            self.head_dim, yarn_factor=yarn.factor, mscale_all_dim=yarn.mscale_all_dim
        )

    @classmethod
    def from_transformers(cls, config: Any) -> LayerConfig:
        """Of a transformers configuration, or of a dict with what config.json of a checkpoint says.

        Raises UnsupportedError for models whose attention is not this layer (another `model_type`,
        or `index_topk`: sparse), and for kinds of RoPE other than default, YaRN and longrope within
        the original context; ValueError if a number is missing.
        """
        values = _Values(config)
        kind = values.get("model_type")
        if kind not in _DEPARTURES:
            raise UnsupportedError(
                f"model_type: got {kind!r}, expected one of {', '.join(_DEPARTURES)}", {}
            )
        if values.get("index_topk"):
            raise UnsupportedError("index_topk: sparse attention is not supported", {})
        departs = _DEPARTURES[kind]
        hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
        q_lora, kv_lora = values.get("q_lora_rank"), values.size("kv_lora_rank")
        gains = departs.get("lora_gains", False)
        rope = _rope_settings(values)
        return cls(
            hidden=hidden,
            heads=heads,
            q_lora=q_lora,
            kv_lora=kv_lora,
            nope=values.size("qk_nope_head_dim"),
            rope=values.size("qk_rope_head_dim"),
            v=values.get("v_head_dim") or hidden // heads,
            rotary=_rotary(values, rope, departs) if departs.get("rotated", True) else None,
            bias=bool(values.get("attention_bias", False)),
            q_gain=(hidden / q_lora) ** 0.5 if gains and q_lora else 1.0,
            latent_gain=(hidden / kv_lora) ** 0.5 if gains else 1.0,
            query_growth=rope.get("llama_4_scaling_beta") or 0.0,
            query_growth_positions=rope.get("original_max_position_embeddings") or 1,
        )


class _Values:
    """A configuration, be it an object or a dict."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def get(self, name: str, default: Any = None) -> Any:
        if isinstance(self._config, Mapping):
            return self._config.get(name, default)
        return getattr(self._config, name, default)

    def size(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int):
            raise ValueError(f"{name}: got {value!r} in the configuration, expected an int")
        return value


def _given(name: str, value: Any) -> Any:
    if not value:
        raise ValueError(f"{name}: got {value!r} in the configuration, expected a value")
    return value


def _rope_settings(values: _Values) -> Any:
    """transformers 5 calls them rope_parameters, before that (and in config.json) rope_scaling."""
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def _rotary(values: _Values, rope: Mapping[str, Any], departs: Mapping[str, Any]) -> Rotary:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    positions = values.get("max_position_embeddings")
    original = rope.get("original_max_position_embeddings") or positions
    yarn, stretch = None, None
    if kind == "yarn":
        original = _given("original_max_position_embeddings", original)
        yarn = Yarn(
            factor=rope.get("factor") or _given("max_position_embeddings", positions) / original,
            original_positions=original,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            mscale=rope.get("mscale") or 0.0,
            mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
            truncate=rope.get("truncate", True),
        )
    elif kind == "longrope":
        short = _given("short_factor", rope.get("short_factor"))
        reach = _given("max_position_embeddings", positions)
        if reach > original and short != rope.get("long_factor"):
            raise UnsupportedError(
                f"rope: longrope with {positions} positions of originally {original}: its factors "
                "would depend on the length of the text",
                {},
            )
        stretch = tuple(short)
    elif kind != "default":
        raise UnsupportedError(f"rope: got {kind!r}, expected default, yarn or longrope", {})
    interleaved = values.get("rope_interleave")
    return Rotary(
        theta=rope.get("rope_theta") or values.get("rope_theta") or departs.get("theta", 10000.0),
        interleaved=departs.get("interleaved", True) if interleaved is None else interleaved,
        yarn=yarn,
        stretch=stretch,
        attention_factor=rope.get("attention_factor"),
    )
