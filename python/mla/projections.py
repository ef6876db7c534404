"""The projections of an MLA layer as a torch module: queries, cache rows and the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .absorb import absorb, absorb_query, expand_output, split_kv_b
from .inputs import TensorOrPair
from .layer_config import LayerConfig
from .query_rows import rotated

if TYPE_CHECKING:
    from typing_extensions import Self


def linear(projection: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, projection.weight, projection.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, as torch computes it: in float32 (float64 for
    it), by one kernel in recent versions. Then, if there is one, times the gain."""

    def __init__(self, columns: int, eps: float, gain: float, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(columns, **where), requires_grad=False)
        self.eps, self.gain = eps, gain

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return normed if self.gain == 1 else normed * self.gain


class Projections(nn.Module):
    """What stands before and behind the attention. See nn.MultiHeadLatentAttention."""

    cos_sin: Tensor | None
    merged_q: Tensor | None
    merged_o: Tensor | None

    def __init__(
        self,
        config: LayerConfig,
        *,
        max_positions: int = 4096,
        cos_sin: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config
        where = {"device": device, "dtype": dtype}

        def made(columns: int, rows: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(columns, rows, bias=bias, **where).requires_grad_(False)

        if c.q_lora is None:
            self.q_proj = made(c.hidden, c.heads * c.head_dim)
        else:
            self.q_a_proj = made(c.hidden, c.q_lora, c.bias)
            self.q_a_layernorm = RMSNorm(c.q_lora, c.norm_eps, c.q_gain, **where)
            self.q_b_proj = made(c.q_lora, c.heads * c.head_dim)
        self.kv_a_proj_with_mqa = made(c.hidden, c.kv_lora + c.rope, c.bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora, c.norm_eps, c.latent_gain, **where)
        self.kv_b_proj = made(c.kv_lora, c.heads * (c.nope + c.v))
        self.o_proj = made(c.heads * c.v, c.hidden, c.bias)
        if cos_sin is None and c.rotary is not None and c.rope:
            cos_sin = c.rotary.table(c.rope, max_positions, device)
        self.register_buffer("cos_sin", cos_sin, persistent=False)
        self.register_buffer("merged_q", None, persistent=False)
        self.register_buffer("merged_o", None, persistent=False)

    @classmethod
    def from_transformers(
        cls, attention: nn.Module, *, max_positions: int = 4096, cos_sin: Tensor | None = None
    ) -> Self:
        """Of an attention module of transformers, whose weights it shares.

        attention: DeepseekV2Attention, DeepseekV3Attention or one of another model that
            `LayerConfig.from_transformers` takes.

        Raises as that does, and TypeError for another kind of module.
        """
        if not all(hasattr(attention, name) for name in ("config", "kv_a_layernorm")):
            got = type(attention).__name__
            raise TypeError(f"attention: got {got}, expected an MLA of transformers")
        norm: Any = attention.kv_a_layernorm
        config = LayerConfig.from_transformers(attention.config)
        config = replace(config, norm_eps=getattr(norm, "variance_epsilon", config.norm_eps))
        weight = norm.weight
        if cos_sin is None and config.rotary is not None:
            cos_sin = config.rotary.table(config.rope, max_positions, weight.device)
        layer = cls(config, cos_sin=cos_sin, device="meta", dtype=weight.dtype)
        layer.load_state_dict(attention.state_dict(), assign=True)
        return layer.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """cos_sin stays float32 where the layer changes its dtype, and is made again where a layer
        without memory gets some."""
        table, rotary = self.cos_sin, self.config.rotary
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if table is not None and rotary is not None:
            device = self.o_proj.weight.device
            if table.is_meta and device.type != "meta":
                table = rotary.table(self.config.rope, len(table), device)
            self.cos_sin = table.to(device)
        return self

    def merge_weights(self) -> None:
        """From now on the absorbed graph uses the weights of `absorb`: two products less a step,
        for more memory. Loading other weights needs another call."""
        w_q = (self.q_proj if self.config.q_lora is None else self.q_b_proj).weight
        merged = absorb(w_q, self.kv_b_proj.weight, self.o_proj.weight, self.config)
        self.merged_q, self.merged_o = merged

    def latents(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden [.., hidden] -> what `append` takes: latents [.., kv_lora], rope columns [.., r]
        before their rotation, None if there are none."""
        c = self.config
        rows = linear(self.kv_a_proj_with_mqa, hidden)
        return self.kv_a_layernorm(rows[..., : c.kv_lora]), rows[
            ..., c.kv_lora :
        ] if c.rope else None

    def queries(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """q_nope [.., heads, nope], and rotated q_rope [.., heads, r]; positions int32 [..]."""
        projection = self.q_proj if self.config.q_lora is None else self.q_b_proj
        return self._queries(linear(projection, self._query_input(hidden)), positions)

    def absorbed_query(self, hidden: Tensor, positions: Tensor) -> TensorOrPair:
        """`q` of `decode`."""
        if self.merged_q is None:
            q_nope, q_rope = self.queries(hidden, positions)
            q_latent = absorb_query(q_nope, split_kv_b(self.kv_b_proj.weight, self.config)[0])
        else:
            q = functional.linear(self._query_input(hidden), self.merged_q)
            q_latent, q_rope = self._queries(q, positions)
        return q_latent if q_rope is None else (q_latent, q_rope)

    def project_latents(self, o_latent: Tensor) -> Tensor:
        """What `decode` returned, [.., heads, kv_lora] -> [.., hidden]."""
        if self.merged_o is not None:
            return functional.linear(o_latent.flatten(-2), self.merged_o, self.o_proj.bias)
        w_uv = split_kv_b(self.kv_b_proj.weight, self.config)[1]
        return linear(self.o_proj, expand_output(o_latent, w_uv).flatten(-2))

    def _query_input(self, hidden: Tensor) -> Tensor:
        if self.config.q_lora is None:
            return hidden
        normed: Tensor = self.q_a_layernorm(linear(self.q_a_proj, hidden))
        return normed

    def _queries(self, q: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a projection [.., heads * columns], those before the rope columns, and these rotated.
        Positions beyond cos_sin count as its last; their tokens have no place in the cache."""
        c, rotary, table = self.config, self.config.rotary, self.cos_sin
        columns = q.shape[-1] // c.heads
        q = self._grow(q.view(*positions.shape, c.heads, columns), positions)
        if not c.rope:
            return q, None
        if rotary is None or table is None:
            return q[..., : -c.rope], q[..., -c.rope :]
        angles = table.index_select(0, positions.flatten().clamp(0, table.shape[0] - 1))
        rest, rope = rotated(q.flatten(0, -3), angles, interleaved=rotary.interleaved)
        shape = q.shape[:-1]
        return rest.view(*shape, columns - c.rope), rope.view(*shape, c.rope)

    def _grow(self, q: Tensor, positions: Tensor) -> Tensor:
        c = self.config
        if not c.query_growth:
            return q
        steps = positions.clamp(min=0) // c.query_growth_positions
        return (q * (1 + c.query_growth * torch.log1p(steps.float()))[..., None, None]).to(q.dtype)
