"""`mla explain`: which variant a problem gets, here or on a GPU that is elsewhere."""

from __future__ import annotations

from argparse import Namespace

import torch

import mla

from .usage import UsageError


def run(args: Namespace) -> int:
    b = args.b or len(args.kv)
    if len(args.kv) not in (1, b):
        raise UsageError(f"--kv lists {len(args.kv)} lengths for --b {b}: give one length or b")
    try:
        if args.prefill:
            return _prefill(args)
        explanation = mla.explain(
            b=b,
            s_q=args.s_q,
            h_q=args.h,
            kv_len=max(args.kv),
            d_qk=args.d_qk,
            dtype=getattr(torch, args.dtype),
            page_size=args.page_size,
            device=args.gpu or args.device,
            batch_invariant=args.batch_invariant,
            max_seq_len=args.max_seq_len,
            variant=args.variant,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    print(explanation)
    return 0 if explanation.variant else 1


def _prefill(args: Namespace) -> int:
    for name, usual in (("d_qk", 576), ("batch_invariant", False), ("variant", None)):
        if getattr(args, name) != usual:
            raise UsageError(f"--{name.replace('_', '-')} says nothing with --prefill")
    if max(args.kv) < args.s_q:
        raise UsageError(f"--kv {max(args.kv)}: expected --s-q {args.s_q} or more")
    found = mla.explain_prefill(
        args.s_q,
        max(args.kv) - args.s_q,
        b=args.b or len(args.kv),
        heads=args.h,
        dtype=getattr(torch, args.dtype),
        page_size=args.page_size,
        device=args.gpu or args.device,
    )
    print(found)
    return 0
