"""Attention weights of a Hugging Face checkpoint, by their names there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import shape_of, wrong

BLOCK = 128  # rows and columns that share a scale of an 8-bit weight
_SCALE = "_scale_inv"


def attention_weights(
    checkpoint: Mapping[str, Tensor], layer: int | str, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """What `nn.MultiHeadLatentAttention.load_state_dict` takes, from a checkpoint's tensors.

    checkpoint: by name, as safetensors files and state dicts have them.
    layer: a number, for names that begin with "model.layers.{layer}.self_attn."; or that beginning.
    dtype: to convert to; None leaves weights as they are, 8-bit ones in bfloat16.

    8-bit weights as DeepSeek-V3 is published with (float8_e4m3fn, and beside each `weight` a
    `weight_scale_inv`, float32 [rows / 128, columns / 128], rounded up, of blocks) are multiplied
    by their scales in float32. Buffers that old checkpoints have (`rotary_emb.inv_freq`) are left
    out. Raises KeyError if there is no such layer, ValueError for 8-bit weights in other forms.
    """
    prefix = f"model.layers.{layer}.self_attn." if isinstance(layer, int) else layer
    found = {
        name[len(prefix) :]: tensor
        for name, tensor in checkpoint.items()
        if name.startswith(prefix) and "rotary_emb" not in name
    }
    if not found:
        raise KeyError(f"layer: no tensor's name begins with {prefix!r}")
    weights = {}
    for name, tensor in found.items():
        if name.endswith(_SCALE):
            continue
        scales = found.get(name + _SCALE)
        if tensor.dtype.itemsize < 2 or scales is not None:
            tensor = _dequantised(name, tensor, scales).to(dtype or torch.bfloat16)
        weights[name] = tensor if dtype is None else tensor.to(dtype)
    return weights


def _dequantised(name: str, weight: Tensor, scales: Tensor | None) -> Tensor:
    blocks = [-(-size // BLOCK) for size in weight.shape]
    if scales is None or list(scales.shape) != blocks:
        got = f"{weight.dtype} with " + ("no scales" if scales is None else shape_of(scales))
        raise wrong(name, got, f"{name}{_SCALE} {blocks}: one for each {BLOCK} x {BLOCK} block")
    by_block = scales.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight.float() * by_block[: weight.shape[0], : weight.shape[1]]
