"""`mla explain`: which variant a problem gets, here or on a GPU that is elsewhere."""

from __future__ import annotations

from argparse import Namespace

import torch

import mla

from .arguments import UsageError


def run(args: Namespace) -> int:
    b = args.b or len(args.kv)
    if len(args.kv) not in (1, b):
        raise UsageError(f"--kv lists {len(args.kv)} lengths for --b {b}: give one length or b")
    try:
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
