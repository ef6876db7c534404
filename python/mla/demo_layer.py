"""A DeepSeek-V3-shaped attention layer with random weights, and its un-absorbed float64 reference.

What `mla demo` runs. The layer keeps one latent row per token and never expands it: W_UK is
absorbed into the query, W_UV is applied to the attention's output. The reference does the
opposite, with keys and values of every head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerConfig:
    """Sizes of DeepSeek-V3's attention, and the YaRN numbers of its published configuration."""

    hidden: int = 7168
    heads: int = 128
    q_lora: int = 1536
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    v: int = 128
    rope_theta: float = 10000.0
    yarn_factor: float = 40.0
    yarn_positions: int = 4096  # of the training before the context was extended
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale_all_dim: float = 1.0

    @property
    def scale(self) -> float:
        """Of the softmax: YaRN's factor enters squared, for the query and for the key. 0.135234."""
        mscale = 0.1 * self.yarn_mscale_all_dim * math.log(self.yarn_factor) + 1.0
        return mscale**2 / math.sqrt(self.nope + self.rope)


def rope_frequencies(config: LayerConfig) -> Tensor:
    """Angle per position of each pair, float64 [rope / 2].

    YaRN: pairs that turn more than beta_fast times within the original positions keep their
    frequency, those that turn less than beta_slow times are slowed down by the factor, those
    between are blended.
    """

    def pair_that_turns(times: float) -> float:
        wavelength = config.yarn_positions / (2 * math.pi * times)
        return config.rope * math.log(wavelength) / (2 * math.log(config.rope_theta))

    pairs = torch.arange(config.rope // 2, dtype=torch.float64)
    frequencies = config.rope_theta ** (-2 * pairs / config.rope)
    low = max(math.floor(pair_that_turns(config.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.yarn_beta_slow)), config.rope - 1)
    slowed = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / config.yarn_factor * slowed


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE on neighbouring elements: x [..., rope], angles broadcastable to [..., rope / 2]."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = angles.cos().float(), angles.sin().float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm with unit weight over the last dimension, computed in float32; in x's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class DemoLayer:
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
        self.config = config
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, fan_in: int) -> Tensor:
            w = torch.randn(shape, generator=generator, dtype=dtype)
            return w.mul_(fan_in**-0.5).to(device)

        c = config
        self.embedding = weight(vocabulary, c.hidden, fan_in=1)
        self.w_dq = weight(c.q_lora, c.hidden, fan_in=c.hidden)
        self.w_uq = weight(c.heads * (c.nope + c.rope), c.q_lora, fan_in=c.q_lora)
        self.w_dkv = weight(c.kv_lora + c.rope, c.hidden, fan_in=c.hidden)
        self.w_uk = weight(c.heads, c.nope, c.kv_lora, fan_in=c.kv_lora)
        self.w_uv = weight(c.heads, c.v, c.kv_lora, fan_in=c.kv_lora)
        self.w_o = weight(c.hidden, c.heads * c.v, fan_in=c.heads * c.v)
        self._frequencies = rope_frequencies(config).to(device)

    def _angles(self, positions: Tensor) -> Tensor:
        return positions.double()[:, None] * self._frequencies

    def embed(self, tokens: Tensor) -> Tensor:
        """Normed hidden states [n, hidden] of token ids [n]."""
        return rms_norm(self.embedding[tokens])

    def cache_rows(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """What the cache keeps of n tokens, [n, kv_lora + rope]: normed latents, rotated keys."""
        c = self.config
        latent, rope = torch.split(hidden @ self.w_dkv.T, [c.kv_lora, c.rope], dim=-1)
        return torch.cat((rms_norm(latent), rotate_pairs(rope, self._angles(positions))), dim=-1)

    def queries(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Per-head queries before absorption: [n, heads, nope] and, rotated, [n, heads, rope]."""
        c = self.config
        q = rms_norm(hidden @ self.w_dq.T) @ self.w_uq.T
        nope, rope = torch.split(q.view(-1, c.heads, c.nope + c.rope), [c.nope, c.rope], dim=-1)
        return nope, rotate_pairs(rope, self._angles(positions)[:, None])

    def absorb(self, q_nope: Tensor) -> Tensor:
        """[n, heads, nope] -> [n, heads, kv_lora]: queries that meet latents instead of keys."""
        return torch.matmul(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1)

    def head_values(self, o_latent: Tensor) -> Tensor:
        """[n, heads, kv_lora] -> [n, heads, v]: what the value matrix makes of weighted sums."""
        return torch.matmul(o_latent.transpose(0, 1), self.w_uv.transpose(1, 2)).transpose(0, 1)

    def project(self, heads: Tensor) -> Tensor:
        """[n, heads, v] -> the layer's output [n, hidden]."""
        return heads.flatten(1) @ self.w_o.T


class ExpandedReference:
    """Un-absorbed attention in float64: every head's keys and values, kept from step to step.

    It starts from the layer's own queries and cache rows, in the precision in which the layer holds
    them, and never sees the paged cache. About 330 KB per token for 128 heads.
    """

    def __init__(self, layer: DemoLayer, capacities: list[int]):
        """Room for `capacities[i]` tokens of request i."""
        c = layer.config
        self._config = c
        self._w_uk, self._w_uv = layer.w_uk.double(), layer.w_uv.double()
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
        p = torch.softmax(s * self._config.scale, dim=-1)
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

    def write(self, requests: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Stores rows [n, width] at positions [n] of requests [n], which grow by as many tokens."""
        page_size = self.kv.shape[1]
        pages = self.block_table[requests, positions // page_size].long()
        self.kv[pages, positions % page_size] = rows
        self.seq_lens.index_add_(0, requests, torch.ones_like(requests, dtype=torch.int32))
