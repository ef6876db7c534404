"""A DeepSeek-V3-shaped attention layer with random weights, and its un-absorbed float64 reference.

What `mla demo` runs. The layer keeps one latent row per token and never expands it: W_UK is
absorbed into the query, W_UV is applied to the attention's output. The reference does the
opposite, with keys and values of every head.
"""

import torch
from torch import Tensor

from .absorb import split_kv_b
from .append import append
from .layer_config import LayerConfig
from .nn import MultiHeadLatentAttention
from .projections import linear
from .rope import Rotary, Yarn, rotate


def deepseek_v3(*, hidden: int = 7168, heads: int = 128, q_lora: int = 1536) -> LayerConfig:
    """The sizes and YaRN's numbers of its published configuration, or fewer of some."""
    yarn = Yarn(factor=40, original_positions=4096, mscale=1.0, mscale_all_dim=1.0)
    return LayerConfig(
        hidden=hidden,
        heads=heads,
        q_lora=q_lora,
        kv_lora=512,
        nope=128,
        rope=64,
        v=128,
        rotary=Rotary(theta=10000.0, yarn=yarn),
    )


class DemoLayer(MultiHeadLatentAttention):
    """An embedding and one attention layer.

    Weights are normal, scaled so that latents, queries and keys come out as about N(0, 1).
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ):
        """Draws the weights on the CPU, the same for every device: 0.4 GB in a 16-bit dtype."""
        super().__init__(config, device="meta", dtype=dtype)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        self.embedding = draw(vocabulary, config.hidden).to(device)
        self.to_empty(device=device)
        for weight in self.parameters():
            is_norm = weight.dim() == 1
            weight.copy_(
                torch.ones(()) if is_norm else draw(*weight.shape) * weight.shape[1] ** -0.5
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [.., hidden] of token ids [..], of about the size that norms leave."""
        return self.embedding[tokens]

    def cache_rows(self, latent: Tensor, rope: Tensor, positions: Tensor) -> Tensor:
        """What the cache keeps of tokens, [.., kv_lora + rope], without `append`."""
        assert self.cos_sin is not None
        turned = rotate(rope, self.cos_sin[positions.long()], interleaved=True)
        return torch.cat((latent, turned), dim=-1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """W_UK [heads, nope, kv_lora] and W_UV [heads, v, kv_lora]."""
        return split_kv_b(self.kv_b_proj.weight, self.config)

    def project(self, heads: Tensor) -> Tensor:
        """[.., heads, v] -> the layer's output [.., hidden]."""
        return linear(self.o_proj, heads.flatten(-2))


class ExpandedReference:
    """Un-absorbed attention in float64: every head's keys and values, kept from step to step.

    It starts from the layer's own queries and cache rows, in the precision in which the layer holds
    them, and never sees the paged cache. About 330 KB per token for 128 heads.
    """

    def __init__(self, layer: DemoLayer, capacities: list[int]):
        """Room for `capacities[i]` tokens of request i."""
        c = layer.config
        self._config = c
        self._w_uk, self._w_uv = (w.double() for w in layer.factors())
        new = self._w_uk.new_empty
        self._k_nope = [new(c.heads, capacity, c.nope) for capacity in capacities]
        self._k_rope = [new(capacity, c.rope) for capacity in capacities]
        self._v = [new(c.heads, capacity, c.v) for capacity in capacities]
        self._lens = [0] * len(capacities)

    def append(self, request: int, rows: Tensor) -> None:
        """Expands a request's next cache rows [n, kv_lora + rope] into keys and values."""
        latent, rope = torch.split(rows.double(), [self._config.kv_lora, self._config.rope], dim=-1)
        begin, end = self._lens[request], self._lens[request] + len(rows)
        self._k_nope[request][:, begin:end] = latent @ self._w_uk.transpose(1, 2)
        self._k_rope[request][begin:end] = rope
        self._v[request][:, begin:end] = latent @ self._w_uv.transpose(1, 2)
        self._lens[request] = end

    def attend(self, request: int, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Output [heads, v] for queries [heads, nope], [heads, rope] over all tokens so far."""
        n = self._lens[request]
        s = (self._k_nope[request][:, :n] @ q_nope.double()[..., None])[..., 0]
        s += q_rope.double() @ self._k_rope[request][:n].T
        p = torch.softmax(s * self._config.softmax_scale, dim=-1)
        return (p[:, None] @ self._v[request][:, :n])[:, 0]


class PagedCache:
    """The latent cache of a batch: one pool of pages, scattered over the requests.

    The pool starts out as NaN and the block table as -1: whoever looks where no token is shows it.
    """

    def __init__(
        self,
        capacities: list[int],
        config: LayerConfig,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Pages for `capacities[i]` tokens of request i, all still empty."""
        pages = [-(-capacity // page_size) for capacity in capacities]
        shape = (sum(pages), page_size, config.kv_lora + config.rope)
        self.kv = torch.full(shape, float("nan"), dtype=dtype, device=device)
        table = torch.full((len(pages), max(pages)), -1, dtype=torch.int32)
        ids = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0))
        for row, own in zip(table, torch.split(ids, pages), strict=True):
            row[: len(own)] = own
        self.block_table = table.to(device)
        self.seq_lens = torch.zeros(len(pages), dtype=torch.int32, device=device)

    def write(
        self, layer: DemoLayer, requests: slice, latent: Tensor, rope: Tensor, positions: Tensor
    ) -> None:
        """The next tokens of some requests, [requests, s, ..], at positions [requests, s]."""
        append(
            latent,
            rope,
            self.kv,
            self.block_table[requests],
            positions,
            cos_sin=layer.cos_sin,
            interleaved=True,
        )
        self.seq_lens[requests] += positions.shape[1]
