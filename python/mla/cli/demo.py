"""`mla demo`: a DeepSeek-V3-shaped attention layer decodes a real text; every step is checked."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

import mla
from mla import data
from mla.absorb import absorb_query, expand_output
from mla.demo_layer import DemoLayer, ExpandedReference, PagedCache, deepseek_v3
from mla.reference import Errors, errors

from .console import console, make_progress, make_table
from .devices import device_name, pick_device
from .excerpts import excerpts

# Relative RMSE. The layer rounds where the reference does not: absorbed queries, probabilities,
# sums over latents, outputs of heads. Each costs at most half a unit in the last place; together
# they come to 3e-3 in bf16 and 4e-4 in fp16.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
_SHOWN_STEPS = 8


@dataclass(frozen=True)
class Step:
    """One token of every request: the request with the largest error, and seconds on the clock."""

    errors: Errors
    layer_s: float  # all of the layer
    attention_s: float  # `mla.decode` in it


def run(args: Namespace) -> int:
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    prompts, continuations = excerpts(args.steps)
    config = deepseek_v3()
    console.print(
        f"One attention layer shaped like DeepSeek-V3's ({config.heads} heads, {config.kv_lora} + "
        f"{config.rope} numbers a token, softmax scale {config.softmax_scale:.6f}), random "
        f"weights, {args.dtype}, on {device_name(device)}",
        style="bold",
    )
    with console.status("drawing weights"):
        layer = DemoLayer(
            config, vocabulary=data.VOCABULARY, dtype=dtype, device=device, seed=args.seed
        )
    capacities = [len(prompt) + args.steps for prompt in prompts]
    cache = PagedCache(capacities, config, args.page_size, dtype, device)
    reference = ExpandedReference(layer, capacities)
    with console.status("reading the prompts"):
        _read_prompts(layer, cache, reference, prompts)
    plan = mla.plan(
        cache.seq_lens,
        h_q=config.heads,
        d_qk=config.kv_lora + config.rope,
        dtype=dtype,
        page_size=args.page_size,
        max_pages=cache.block_table.shape[1],
        variant=args.variant,
    )
    _print_requests(prompts, continuations)

    tokens = torch.tensor(continuations, device=device)
    with make_progress() as progress:
        steps = [
            _decode_step(layer, cache, reference, plan, tokens[:, i])
            for i in progress.track(range(args.steps), description="decoding")
        ]
    return _report(steps, len(prompts), plan.variant.name, TOLERANCE[dtype])


def _read_prompts(
    layer: DemoLayer, cache: PagedCache, reference: ExpandedReference, prompts: list[list[int]]
) -> None:
    """Fills both caches. A single layer needs nothing else of a prompt than its rows."""
    for request, prompt in enumerate(prompts):
        tokens = torch.tensor(prompt, device=cache.seq_lens.device)
        positions = torch.arange(len(prompt), dtype=torch.int32, device=tokens.device)
        latent, rope = _new_rows(layer, layer.embed(tokens))
        own = slice(request, request + 1)
        cache.write(layer, own, latent[None], rope[None], positions[None])
        reference.append(request, layer.cache_rows(latent, rope, positions))


def _new_rows(layer: DemoLayer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    latent, rope = layer.latents(hidden)
    assert rope is not None
    return latent, rope


def _decode_step(
    layer: DemoLayer,
    cache: PagedCache,
    reference: ExpandedReference,
    plan: mla.Plan,
    tokens: Tensor,
) -> Step:
    """One token [b] of every request through the layer, then through the reference."""
    w_uk, w_uv = layer.factors()
    start = _now(tokens.device)
    positions = cache.seq_lens[:, None].clone()
    hidden = layer.embed(tokens[:, None])
    latent, rope = _new_rows(layer, hidden)
    cache.write(layer, slice(None), latent, rope, positions)
    q_nope, q_rope = layer.queries(hidden, positions)
    assert q_rope is not None
    q_latent = absorb_query(q_nope, w_uk)

    plan.update(cache.seq_lens)
    before_attention = _now(tokens.device)
    o_latent = mla.decode(
        (q_latent, q_rope),
        cache.kv,
        cache.block_table,
        cache.seq_lens,
        scale=layer.config.softmax_scale,
        plan=plan,
    )
    after_attention = _now(tokens.device)
    heads = expand_output(o_latent, w_uv)
    layer.project(heads)
    end = _now(tokens.device)

    rows = layer.cache_rows(latent, rope, positions)
    by_request = []
    for request in range(len(tokens)):
        reference.append(request, rows[request])
        want = reference.attend(request, q_nope[request, 0], q_rope[request, 0])
        by_request.append(errors(heads[request, 0], want))
    worst = max(by_request, key=lambda e: (e.relative_rmse != e.relative_rmse, e.relative_rmse))
    return Step(worst, end - start, after_attention - before_attention)


def _now(device: torch.device) -> float:
    """Seconds, once everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _print_requests(prompts: list[list[int]], continuations: list[list[int]]) -> None:
    table = make_table("requests", "", "prompt", "tokens", "then decoded")
    for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        shown = [data.decode(tokens).replace("\n", " ") for tokens in (prompt, continuation)]
        ending = f"..{shown[0][-40:]}" if len(shown[0]) > 40 else shown[0]
        shown_prompt = repr(ending) if ending else "(only the begin token)"
        table.add_row(str(i), shown_prompt, str(len(prompt)), repr(shown[1][:60]))
    console.print(table)


def _report(steps: list[Step], requests: int, variant: str, tolerance: float) -> int:
    table = make_table("errors", "step", *Errors._fields, numbers=1 + len(Errors._fields))
    every = -(-len(steps) // _SHOWN_STEPS)
    for i, step in enumerate(steps):
        if i % every == 0 or i == len(steps) - 1:
            table.add_row(str(i), *(f"{error:.1e}" for error in step.errors))
    wrong = [i for i, step in enumerate(steps) if not step.errors.relative_rmse <= tolerance]
    largest = torch.tensor([step.errors for step in steps]).amax(0).tolist()
    table.add_section()
    table.add_row("largest", *(f"{error:.1e}" for error in largest))
    console.print(table)

    timed = steps[1:] or steps  # the first one warms up
    layer_s = sum(step.layer_s for step in timed) / len(timed)
    attention_s = sum(step.attention_s for step in timed) / len(timed)
    console.print(
        f"variant {variant}: {requests / layer_s:.1f} tokens/s through the layer; "
        f"{layer_s * 1e3:.2f} ms a step, of which {attention_s * 1e3:.2f} ms are mla.decode"
    )
    if wrong:
        console.print(
            f"{len(wrong)} of {len(steps)} steps are wrong, the first is step {wrong[0]}: "
            f"relative RMSE over {tolerance:.0e}",
            style="bold red",
        )
        return 1
    console.print(
        f"all {len(steps)} steps agree with the un-absorbed float64 reference: "
        f"relative RMSE {largest[1]:.1e}, at most {tolerance:.0e} allowed",
        style="bold green",
    )
    return 0
