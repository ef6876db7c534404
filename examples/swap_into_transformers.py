"""Puts mla.nn.MultiHeadLatentAttention into a DeepSeek-V3 model of transformers, and generates.

    pip install 'mla' 'transformers>=5'
    python examples/swap_into_transformers.py                     # a small model, random weights
    python examples/swap_into_transformers.py --model <folder>    # one that fits the device

The latents lie in pages of mla's; transformers' own cache only counts tokens. Requests have equal
lengths, without padding. The weights are those of the model, not copies.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from mla import LayerConfig
from mla.nn import MultiHeadLatentAttention
from torch import Tensor, nn


class PagedAttention(nn.Module):
    """In the place of a `self_attn`: a layer of mla's and its part of the cache."""

    def __init__(self, attention: nn.Module, cos_sin: Tensor, page_size: int) -> None:
        super().__init__()
        self.layer = MultiHeadLatentAttention.from_transformers(attention, cos_sin=cos_sin)
        self.layer_idx = attention.layer_idx
        self.page_size = page_size
        self.max_pages = -(-len(cos_sin) // page_size)
        self.kv_cache: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """attention_mask is not looked at: each token sees all before it."""
        b, s, _ = hidden_states.shape
        cache = past_key_values if cache is None else cache  # its name before transformers 5.24
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        if past == 0:
            self._allocate(b, hidden_states)
        if cache is not None:  # one column, for it to count
            counted = hidden_states.new_zeros(b, 1, s, 1)
            cache.update(counted, counted, self.layer_idx)
        device = hidden_states.device
        positions = torch.arange(past, past + s, dtype=torch.int32, device=device).expand(b, s)
        seq_lens = torch.full((b,), past + s, dtype=torch.int32, device=device)
        return self.layer(hidden_states, positions, self.kv_cache, self.block_table, seq_lens), None

    def _allocate(self, b: int, like: Tensor) -> None:
        """All pages that b requests may need. An engine would hand them out as they grow."""
        pages = b * self.max_pages
        if self.kv_cache is None or len(self.kv_cache) < pages:
            row = self.layer.config.d_qk
            self.kv_cache = like.new_empty(pages, self.page_size, row)
        table = torch.arange(pages, dtype=torch.int32, device=like.device)
        self.block_table = table.view(b, self.max_pages)


def swap(model: nn.Module, *, max_positions: int, page_size: int = 64) -> None:
    """Replaces every attention of a causal LM of transformers with an MLA that mla has."""
    config = LayerConfig.from_transformers(model.config)
    device = next(model.parameters()).device
    cos_sin = config.rotary.table(config.rope, max_positions, device)
    for block in model.model.layers:
        block.self_attn = PagedAttention(block.self_attn, cos_sin, page_size)


def small_model(dtype: torch.dtype, device: torch.device) -> Any:
    """DeepSeek-V3's attention with fewer heads, four layers, few experts, random weights."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=96,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )
    return transformers.DeepseekV3ForCausalLM(config).to(device, dtype).eval()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder of a checkpoint; a small random model without it")
    parser.add_argument("--prompt", default="Multi-head latent attention")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    if args.model is None:
        model = small_model(dtype, device)
        prompt = torch.tensor([list(args.prompt.encode())], device=device)
    else:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(args.model, dtype=dtype).to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        prompt = tokenizer(args.prompt, return_tensors="pt").input_ids.to(device)

    want = model(prompt).logits.double()
    swap(model, max_positions=prompt.shape[1] + args.tokens)
    got = model(prompt, use_cache=True).logits.double()
    error = (got - want).norm() / want.norm()
    print(f"logits of the prompt: relative RMSE {error:.1e} to those of transformers' attention")
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.tokens, do_sample=False,
        pad_token_id=0,
    )[0, prompt.shape[1] :]  # fmt: skip
    print(tokens.tolist() if args.model is None else tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
