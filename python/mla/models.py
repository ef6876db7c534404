"""Dimensions and softmax scale of the models that use MLA, before tensor parallelism.

From their published configurations; `LayerConfig.from_transformers` reads everything else there.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layer_config import Dims
from .rope import softmax_scale


@dataclass(frozen=True, kw_only=True)
class Model(Dims):
    """Dims, and what the scale depends on. `note`: how its attention is more than this layer."""

    yarn_factor: float = 1.0
    mscale_all_dim: float = 0.0
    note: str = ""

    @property
    def scale(self) -> float:
        """`scale` of `decode` and `prefill`: softmax_scale(head_dim, ..) of mla.rope."""
        return softmax_scale(
            self.head_dim, yarn_factor=self.yarn_factor, mscale_all_dim=self.mscale_all_dim
        )


def _model(
    heads: int, q_lora: int | None, kv_lora: int, nope: int, rope: int, v: int, note: str = "",
    yarn: tuple[float, float] = (1.0, 0.0),
) -> Model:  # fmt: skip
    return Model(
        heads=heads,
        q_lora=q_lora,
        kv_lora=kv_lora,
        nope=nope,
        rope=rope,
        v=v,
        yarn_factor=yarn[0],
        mscale_all_dim=yarn[1],
        note=note,
    )


_SPARSE = "attends to selected tokens only"
_GATED = "gates its output; other layers are no attention"
_NOPE = "nothing is rotated"

# The columns: heads, q_lora, kv_lora, nope, rope, v.
MODELS: dict[str, Model] = {
    "DeepSeek-V2": _model(128, 1536, 512, 128, 64, 128, yarn=(40, 0.707)),
    "DeepSeek-V2-Lite": _model(16, None, 512, 128, 64, 128, yarn=(40, 0.707)),
    "DeepSeek-V3": _model(128, 1536, 512, 128, 64, 128, yarn=(40, 1)),
    "DeepSeek-V3.2": _model(128, 1536, 512, 128, 64, 128, _SPARSE, yarn=(40, 1)),
    "Kimi-K2": _model(64, 1536, 512, 128, 64, 128, yarn=(32, 1)),
    "Kimi-K2-0905": _model(64, 1536, 512, 128, 64, 128, yarn=(64, 1)),
    "Moonlight-16B": _model(16, None, 512, 128, 64, 128),
    "Kimi-Linear-48B": _model(32, None, 512, 128, 64, 128, _NOPE),
    "LongCat-Flash": _model(64, 1536, 512, 128, 64, 128, "has gains of query and latent"),
    "MiniCPM3-4B": _model(40, 768, 256, 64, 32, 64),
    "GLM-4.7-Flash": _model(20, 768, 512, 192, 64, 256),
    "GLM-5": _model(64, 2048, 512, 192, 64, 256, _SPARSE),
    "GLM-5.3-Flash": _model(64, 1536, 512, 256, 0, 256, _SPARSE),
    "Mistral-Small-4": _model(
        32, 1024, 256, 64, 64, 128, "queries grow with their position", yarn=(128, 1)
    ),
    "Mistral-Large-4": _model(64, None, 512, 64, 64, 128, _SPARSE),
    "Ling-3.0": _model(32, None, 512, 128, 64, 128, _GATED),
    "Hy-V4": _model(32, 1536, 512, 192, 64, 256, _SPARSE),
    "dots3-note": _model(128, 1024, 512, 128, 64, 128, _SPARSE),
    "A.X-K1": _model(64, 1536, 512, 128, 64, 128),
    "A.X-K2": _model(32, 384, 128, 64, 32, 64, _SPARSE),
    "Youtu-LLM": _model(16, 1536, 512, 128, 64, 128),
}
