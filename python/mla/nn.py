"""MLA as a torch module: projections, RoPE, the paged cache, both computation graphs."""

from __future__ import annotations

from torch import Tensor

from .absorb import absorbed_bytes
from .api import decode
from .append import append
from .checks import check_lengths, check_size, check_tensor, shape_of, wrong
from .inputs import TensorOrPair, parts
from .plan import Plan
from .prefill import prefill
from .prefill_choice import WORKSPACE_BYTES, Sizes, absorbed_at_once, check_method
from .prefill_plan import PrefillPlan
from .prefill_times import Method
from .projections import Projections, linear

__all__ = ["MultiHeadLatentAttention"]


class MultiHeadLatentAttention(Projections):
    """The attention layer of DeepSeek-V2 and V3 and of the models after them; inference only.

    Parameters have the names of Hugging Face checkpoints (`q_a_proj.weight`, ..), so that
    `load_state_dict(checkpoint.attention_weights(tensors, layer))` loads one. W_UK and W_UV stay
    in `kv_b_proj`, which both graphs read; `merge_weights` moves them into query and output.

    config: of the layer. Under tensor parallelism, `heads` are those of this GPU, and outputs are
        to be summed by the caller (give bias=False and add the bias once).
    max_positions: rows of `cos_sin`; tokens at later positions are not written to the cache.
    cos_sin: such a table (`config.rotary.table(config.rope, max_positions)`), for layers to share.
    """

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        kv_cache: TensorOrPair,
        block_table: Tensor,
        seq_lens: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        method: Method | None = None,
        plan: Plan | PrefillPlan | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        variant: str | None = None,
    ) -> Tensor:
        """Appends new tokens to the cache and attends, causally, to it: one step or many tokens.

        hidden: [b, s, hidden], or ragged [tokens, hidden] with `cu_seqlens_q`; dtype of the layer.
        positions: int32 [b, s] or [tokens], of the tokens in their requests, as for `append`.
        kv_cache, block_table, cu_seqlens_q: as for `append` and `decode`.
        seq_lens: int32 [b], KV tokens of each request, these included.
        method: "absorbed", "expanded" or None, as for `prefill`. Absorbed steps can be captured.
        plan: of `mla.plan`, for an absorbed step, or of `mla.plan_prefill`: for all layers of one.
        workspace_bytes, variant: as for `prefill`.

        Returns [b, s, hidden] or [tokens, hidden]. Raises what `append`, `decode` and `prefill` do.
        """
        c = self.config
        self._check_step(hidden, seq_lens, cu_seqlens_q)
        _check_options(method, plan, workspace_bytes, variant)
        latent, k_rope = self.latents(hidden)
        append(
            latent,
            k_rope,
            kv_cache,
            block_table,
            positions,
            cu_seqlens_q=cu_seqlens_q,
            cos_sin=None if k_rope is None else self.cos_sin,
            interleaved=c.rotary is None or c.rotary.interleaved,
        )
        where = (kv_cache, block_table, seq_lens)
        tokens, layers_plan = positions.numel(), plan if isinstance(plan, PrefillPlan) else None
        decode_plan = plan if isinstance(plan, Plan) else None
        if decode_plan is not None or variant is not None:
            method = method or "absorbed"
        elif layers_plan is not None:
            method = "absorbed" if layers_plan.method == "absorbed" else None
        elif method is None:
            num_pages, page_size = parts("kv_cache", "latent, rope", kv_cache)[0].shape[:2]
            sizes = Sizes(
                c.dims, hidden.dtype, hidden.device, len(seq_lens), tokens,
                block_table.shape[1], num_pages, page_size, True, workspace_bytes,
            )  # fmt: skip
            most = positions.shape[1] if cu_seqlens_q is None else tokens
            method = "absorbed" if absorbed_at_once(sizes, most) else None
        step_bytes = tokens * absorbed_bytes(c.heads, c.kv_lora, c.v, hidden.dtype)
        if method == "absorbed" and (step_bytes <= workspace_bytes or decode_plan is not None):
            o_latent = decode(
                self.absorbed_query(hidden, positions),
                *where,
                scale=c.softmax_scale,
                cu_seqlens_q=cu_seqlens_q,
                plan=decode_plan,
                variant=variant,
            )
            return self.project_latents(o_latent)
        q_nope, q_rope = self.queries(hidden, positions)
        attended = prefill(
            q_nope if q_rope is None else (q_nope, q_rope),
            *where,
            self.kv_b_proj.weight,
            scale=c.softmax_scale,
            cu_seqlens_q=cu_seqlens_q,
            method=None if layers_plan else method,
            plan=layers_plan,
            workspace_bytes=workspace_bytes,
            variant=variant,
        )
        return linear(self.o_proj, attended.out.flatten(-2))

    def _check_step(self, hidden: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor | None) -> None:
        """What would be found too late: behind the first launch, or by torch."""
        check_tensor("hidden", hidden)
        weight, ragged = self.o_proj.weight, cu_seqlens_q is not None
        if hidden.dtype != weight.dtype:
            raise TypeError(f"hidden: got {hidden.dtype}, expected {weight.dtype} as the layer has")
        if hidden.device != weight.device:
            raise wrong("hidden", f"device {hidden.device}", f"{weight.device} as the layer")
        columns = self.config.hidden
        if hidden.dim() != (2 if ragged else 3) or hidden.shape[-1] != columns:
            layout = f"[tokens, {columns}] with cu_seqlens_q" if ragged else f"[b, s, {columns}]"
            raise wrong("hidden", shape_of(hidden), layout)
        check_lengths(seq_lens, cu_seqlens_q, None if ragged else hidden.shape[0], hidden.device)


def _check_options(
    method: Method | None,
    plan: Plan | PrefillPlan | None,
    workspace_bytes: int,
    variant: str | None,
) -> None:
    """Each of them, and those that exclude one another."""
    check_method(method)
    check_size("workspace_bytes", workspace_bytes, 1)
    if method == "expanded" and variant is not None:
        raise wrong("variant", repr(variant), "None with method 'expanded'")
    if plan is None:
        return
    if isinstance(plan, PrefillPlan):
        if method or variant:
            raise wrong("plan", "a plan of mla.plan_prefill", "None with a method or a variant")
    elif not isinstance(plan, Plan):
        raise TypeError(
            f"plan: got {type(plan).__name__}, expected an mla.Plan or an mla.PrefillPlan"
        )
    elif method == "expanded":
        raise wrong("plan", "a plan of mla.plan", "None with method 'expanded'")
