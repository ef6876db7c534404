"""Calls of `mla.decode` that are right, and what a caller can get wrong in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

B, S_Q, H, PAGES, PAGE_SIZE, MAX_PAGES = 3, 2, 8, 10, 16, 4
DT = torch.bfloat16

Arguments = dict[str, Any]


def uniform() -> Arguments:
    """A call that is right."""
    return {
        "q": torch.zeros(B, S_Q, H, 576, dtype=DT),
        "kv_cache": torch.zeros(PAGES, PAGE_SIZE, 576, dtype=DT),
        "block_table": torch.zeros(B, MAX_PAGES, dtype=torch.int32),
        "seq_lens": torch.tensor([5, 0, 64], dtype=torch.int32),
        "scale": 0.1,
    }


def ragged() -> Arguments:
    cuts = torch.tensor([0, 1, 1, 5], dtype=torch.int32)
    return uniform() | {"q": torch.zeros(5, H, 576, dtype=DT), "cu_seqlens_q": cuts}


def pairs() -> Arguments:
    return uniform() | {
        "q": (torch.zeros(B, S_Q, H, 512, dtype=DT), torch.zeros(B, S_Q, H, 64, dtype=DT)),
        "kv_cache": (
            torch.zeros(PAGES, PAGE_SIZE, 512, dtype=DT),
            torch.zeros(PAGES, PAGE_SIZE, 64, dtype=DT),
        ),
    }


def zeros(*shape: int, dtype: torch.dtype = DT, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*shape: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def padded(*shape: int, by: int) -> Tensor:
    """Rows of the last size, `by` elements apart from what is dense."""
    return zeros(*shape[:-1], shape[-1] + by)[..., : shape[-1]]


def given(base: Callable[[], Arguments], **changes: Any) -> Arguments:
    return base() | changes


def out_beside_q() -> Arguments:
    """q and out are column slices of one buffer that overlap by 8."""
    buffer = zeros(B, S_Q, H, 576 + 504)
    return given(uniform, q=buffer[..., :576], out=buffer[..., 568:])


def shared(name: str) -> Arguments:
    """`out` in the memory of an input."""
    call = uniform()
    memory = call[name].view(torch.uint8).flatten()
    call[name] = torch.cat([memory, torch.zeros(1 << 20, dtype=torch.uint8)])[: len(memory)]
    storage = call[name].untyped_storage()
    call[name] = call[name].view(uniform()[name].dtype).view(uniform()[name].shape)
    out = torch.empty(0, dtype=DT).set_(storage, 0, (B, S_Q, H, 512))
    return call | {"out": out}


T, V = TypeError, ValueError
WRONG: dict[str, tuple[Callable[[], Arguments], type[Exception], str]] = {
    # Types
    "q is a list": (
        lambda: given(uniform, q=[[1.0]]),
        T,
        "q: got 1 tensors, expected one or the pair (q_nope, q_rope)",
    ),
    "three caches": (
        lambda: given(uniform, kv_cache=(1, 2, 3)),
        T,
        "kv_cache: got 3 tensors, expected one or the pair (latent, rope)",
    ),
    "seq_lens is a list": (
        lambda: given(uniform, seq_lens=[1, 2, 3]),
        T,
        "seq_lens: got list, expected a torch.Tensor",
    ),
    "out is a float": (
        lambda: given(uniform, out=1.0),
        T,
        "out: got float, expected a torch.Tensor",
    ),
    "q is sparse": (
        lambda: given(uniform, q=uniform()["q"].to_sparse()),
        T,
        "q: got a tensor of layout torch.sparse_coo, expected a dense one",
    ),
    "lengths are sparse": (
        lambda: given(uniform, seq_lens=uniform()["seq_lens"].to_sparse()),
        T,
        "seq_lens: got a tensor of layout torch.sparse_coo, expected a dense one",
    ),
    # Dtypes
    "q float32": (
        lambda: given(uniform, q=zeros(B, S_Q, H, 576, dtype=torch.float32)),
        T,
        "q: got torch.float32, expected torch.bfloat16 or torch.float16",
    ),
    "q_nope float64": (
        lambda: given(pairs, q=(zeros(B, S_Q, H, 512, dtype=torch.float64), pairs()["q"][1])),
        T,
        "q_nope: got torch.float64, expected torch.bfloat16 or torch.float16",
    ),
    "cache of the other dtype": (
        lambda: given(uniform, kv_cache=zeros(PAGES, PAGE_SIZE, 576, dtype=torch.float16)),
        T,
        "kv_cache: got torch.float16, expected torch.bfloat16 as in the query",
    ),
    "rope of the other dtype": (
        lambda: given(pairs, q=(pairs()["q"][0], zeros(B, S_Q, H, 64, dtype=torch.float16))),
        T,
        "q_rope: got torch.float16, expected torch.bfloat16 as in the query",
    ),
    "cache in fp8": (
        lambda: given(uniform, kv_cache=uniform()["kv_cache"].to(torch.float8_e4m3fn)),
        T,
        "kv_cache: got torch.float8_e4m3fn, expected torch.bfloat16 as in the query",
    ),
    "block_table int64": (
        lambda: given(uniform, block_table=ints(B, MAX_PAGES, dtype=torch.int64)),
        T,
        "block_table: got torch.int64, expected torch.int32: "
        "convert it once with block_table.to(torch.int32)",
    ),
    "seq_lens int64": (
        lambda: given(uniform, seq_lens=ints(B, dtype=torch.int64)),
        T,
        "seq_lens: got torch.int64, expected torch.int32: "
        "convert it once with seq_lens.to(torch.int32)",
    ),
    "cu_seqlens_q int64": (
        lambda: given(ragged, cu_seqlens_q=ints(B + 1, dtype=torch.int64)),
        T,
        "cu_seqlens_q: got torch.int64, expected torch.int32: "
        "convert it once with cu_seqlens_q.to(torch.int32)",
    ),
    "out of the other dtype": (
        lambda: given(uniform, out=zeros(B, S_Q, H, 512, dtype=torch.float16)),
        T,
        "out: got torch.float16, expected torch.bfloat16",
    ),
    "lse in bf16": (
        lambda: given(uniform, lse=zeros(B, S_Q, H)),
        T,
        "lse: got torch.bfloat16, expected torch.float32",
    ),
    "workspace in int8": (
        lambda: given(uniform, workspace=zeros(4096, dtype=torch.int8)),
        T,
        "workspace: got torch.int8, expected torch.uint8",
    ),
    "workspace is an int": (
        lambda: given(uniform, workspace=4096),
        T,
        "workspace: got int, expected a torch.Tensor",
    ),
    # Devices
    "cache elsewhere": (
        lambda: given(uniform, kv_cache=zeros(PAGES, PAGE_SIZE, 576, device="meta")),
        V,
        "kv_cache: got device meta, expected cpu as the query",
    ),
    "seq_lens elsewhere": (
        lambda: given(uniform, seq_lens=ints(B, device="meta")),
        V,
        "seq_lens: got device meta, expected cpu as the others",
    ),
    "cu_seqlens_q elsewhere": (
        lambda: given(ragged, cu_seqlens_q=ints(B + 1, device="meta")),
        V,
        "cu_seqlens_q: got device meta, expected cpu as the others",
    ),
    "out elsewhere": (
        lambda: given(uniform, out=zeros(B, S_Q, H, 512, device="meta")),
        V,
        "out: got device meta, expected cpu as the query",
    ),
    "workspace elsewhere": (
        lambda: given(uniform, workspace=zeros(64, dtype=torch.uint8, device="meta")),
        V,
        "workspace: got device meta, expected cpu as the query",
    ),
    # Shapes
    "q ragged without cu_seqlens_q": (
        lambda: given(uniform, q=zeros(B, H, 576)),
        V,
        "q: got shape [3, 8, 576], expected [b, s_q, h_q, d_qk], "
        "or cu_seqlens_q for a ragged query",
    ),
    "q of rank 2": (
        lambda: given(uniform, q=zeros(B, 576)),
        V,
        "q: got shape [3, 576], expected [b, s_q, h_q, d_qk]",
    ),
    "q uniform beside cu_seqlens_q": (
        lambda: given(ragged, q=zeros(B, S_Q, H, 576)),
        V,
        "q: got shape [3, 2, 8, 576], expected [tokens, h_q, d_qk] with cu_seqlens_q",
    ),
    "q without heads": (
        lambda: given(uniform, q=zeros(B, S_Q, 0, 576)),
        V,
        "q: got shape [3, 2, 0, 576], expected at least one head",
    ),
    "rows that int32 cannot count": (
        lambda: given(uniform, q=zeros(1, 1, 1, 576).expand(B, 2**10, 2**20, 576)),
        V,
        "q: got 3072 query tokens of 1048576 heads, expected at most 2147482624 query rows",
    ),
    "q_rope of other tokens": (
        lambda: given(pairs, q=(zeros(B, S_Q, H, 512), zeros(B, S_Q, H + 1, 64))),
        V,
        "q_rope: got shape [3, 2, 9, 64], expected [3, 2, 8] before its columns, as q_nope",
    ),
    "seq_lens of other requests": (
        lambda: given(uniform, seq_lens=ints(B + 1)),
        V,
        "seq_lens: got shape [4], expected [3]",
    ),
    "seq_lens of rank 2": (
        lambda: given(ragged, seq_lens=ints(B, 1)),
        V,
        "seq_lens: got shape [3, 1], expected [b]",
    ),
    "block_table of other requests": (
        lambda: given(uniform, block_table=ints(B - 1, MAX_PAGES)),
        V,
        "block_table: got shape [2, 4], expected [3, max_pages]",
    ),
    "block_table flat": (
        lambda: given(uniform, block_table=ints(B * MAX_PAGES)),
        V,
        "block_table: got shape [12], expected [3, max_pages]",
    ),
    "cu_seqlens_q without its end": (
        lambda: given(ragged, cu_seqlens_q=ints(B)),
        V,
        "cu_seqlens_q: got shape [3], expected [4], b + 1 where seq_lens has b",
    ),
    "cu_seqlens_q of rank 2": (
        lambda: given(ragged, cu_seqlens_q=ints(B + 1, 1)),
        V,
        "cu_seqlens_q: got shape [4, 1], expected [4], b + 1 where seq_lens has b",
    ),
    "cache of rank 2": (
        lambda: given(uniform, kv_cache=zeros(PAGES * PAGE_SIZE, 576)),
        V,
        "kv_cache: got shape [160, 576], expected "
        "[pages, page_size, d] or [pages, page_size, 1, d]",
    ),
    "two KV heads": (
        lambda: given(uniform, kv_cache=zeros(PAGES, PAGE_SIZE, 2, 576)),
        V,
        "kv_cache: got shape [10, 16, 2, 576], expected one KV head: [pages, page_size, 1, d]",
    ),
    "pages of nothing": (
        lambda: given(uniform, kv_cache=zeros(PAGES, 0, 576)),
        V,
        "kv_cache: got shape [10, 0, 576], expected a page_size of at least 1",
    ),
    "pages that int32 cannot count": (
        lambda: given(uniform, kv_cache=zeros(1, PAGE_SIZE, 576).expand(2**31, -1, -1)),
        V,
        "kv_cache: got shape [2147483648, 16, 576], expected fewer than 2^31 pages and tokens",
    ),
    "slots that int32 cannot count": (
        lambda: given(uniform, kv_cache=zeros(PAGES, 1, 576).expand(-1, 2**31, -1)),
        V,
        "kv_cache: got shape [10, 2147483648, 576], expected fewer than 2^31 pages and tokens",
    ),
    "rope of other pages": (
        lambda: given(pairs, kv_cache=(pairs()["kv_cache"][0], zeros(PAGES, 8, 64))),
        V,
        "rope: got shape [10, 8, 64], expected [10, 16] pages and page_size, as latent",
    ),
    "out of another shape": (
        lambda: given(uniform, out=zeros(B, H, S_Q, 512)),
        V,
        "out: got shape [3, 8, 2, 512], expected [3, 2, 8, 512]",
    ),
    "out as wide as q": (
        lambda: given(ragged, out=zeros(5, H, 576)),
        V,
        "out: got shape [5, 8, 576], expected [5, 8, 512]",
    ),
    "lse with heads first": (
        lambda: given(uniform, lse=zeros(B, H, S_Q, dtype=torch.float32)),
        V,
        "lse: got shape [3, 8, 2], expected [3, 2, 8]",
    ),
    "workspace of rank 2": (
        lambda: given(uniform, workspace=zeros(64, 64, dtype=torch.uint8)),
        V,
        "workspace: got shape [64, 64], strides [64, 1], expected one contiguous dimension",
    ),
    # Widths
    "d_qk of another model": (
        lambda: given(uniform, q=zeros(B, S_Q, H, 192), kv_cache=zeros(PAGES, PAGE_SIZE, 192)),
        V,
        "q: got d_qk = 192, expected one of "
        "576 (d_v = 512), 512 (d_v = 512), 320 (d_v = 256), 288 (d_v = 256)",
    ),
    "cache of another d_qk": (
        lambda: given(uniform, kv_cache=zeros(PAGES, PAGE_SIZE, 320)),
        V,
        "kv_cache: got rows of 320, expected 576 as in the query",
    ),
    "d_v of another d_qk": (
        lambda: given(uniform, d_v=256),
        V,
        "d_v: got 256, expected 512 with d_qk = 576",
    ),
    "q split elsewhere": (
        lambda: given(pairs, q=(zeros(B, S_Q, H, 64), zeros(B, S_Q, H, 512))),
        V,
        "q_nope: got 64 columns, expected 512, the d_v of d_qk = 576",
    ),
    "cache split elsewhere": (
        lambda: given(pairs, kv_cache=(zeros(PAGES, PAGE_SIZE, 448), zeros(PAGES, PAGE_SIZE, 128))),
        V,
        "latent: got 448 columns, expected 512, the d_v of d_qk = 576",
    ),
    # Strides and addresses
    "q transposed": (
        lambda: given(uniform, q=zeros(B, S_Q, 576, H).transpose(2, 3)),
        V,
        "q: got stride 8 in its last dimension, expected 1",
    ),
    "cache of odd rows": (
        lambda: given(uniform, kv_cache=padded(PAGES, PAGE_SIZE, 576, by=4)),
        V,
        "kv_cache: got strides [9280, 580, 1], expected multiples of 8 (16 bytes) before the last",
    ),
    "q off its alignment": (
        lambda: given(uniform, q=zeros(B * S_Q * H * 576 + 8)[1:-7].view(B, S_Q, H, 576)),
        V,
        "q: got data at byte 2 of 16, expected data aligned to 16 bytes",
    ),
    "out of odd rows": (
        lambda: given(uniform, out=padded(B, S_Q, H, 512, by=2)),
        V,
        "out: got strides [8224, 4112, 514, 1], expected multiples of 8 (16 bytes) before the last",
    ),
    "block_table transposed": (
        lambda: given(uniform, block_table=ints(MAX_PAGES, B).T),
        V,
        "block_table: got stride 3 in its last dimension, expected 1",
    ),
    "every second length": (
        lambda: given(uniform, seq_lens=ints(2 * B)[::2]),
        V,
        "seq_lens: got stride 2 in its last dimension, expected 1",
    ),
    "every second query offset": (
        lambda: given(ragged, cu_seqlens_q=ints(2 * B + 2)[::2]),
        V,
        "cu_seqlens_q: got stride 2 in its last dimension, expected 1",
    ),
    "workspace off its alignment": (
        lambda: given(uniform, workspace=zeros(4096, dtype=torch.uint8)[8:]),
        V,
        "workspace: got data at byte 8 of 16, expected data aligned to 16 bytes",
    ),
    # Overlaps
    "out expanded": (
        lambda: given(uniform, out=zeros(1, S_Q, H, 512).expand(B, S_Q, H, 512)),
        V,
        "out: got strides [0, 4096, 512, 1] for shape [3, 2, 8, 512], "
        "expected elements that do not overlap",
    ),
    "lse expanded": (
        lambda: given(uniform, lse=zeros(B, S_Q, 1, dtype=torch.float32).expand(B, S_Q, H)),
        V,
        "lse: got strides [2, 1, 0] for shape [3, 2, 8], expected elements that do not overlap",
    ),
    "out is q_nope": (
        lambda: (call := pairs()) | {"out": call["q"][0]},
        V,
        "out: overlaps q_nope in memory, expected memory of its own",
    ),
    "out in q": (out_beside_q, V, "out: overlaps q in memory, expected memory of its own"),
    "out in the cache": (
        lambda: shared("kv_cache"),
        V,
        "out: overlaps kv_cache in memory, expected memory of its own",
    ),
    "lse in out": (
        lambda: given(
            uniform,
            out=(out := zeros(B, S_Q, H, 512)),
            lse=out.flatten()[: 2 * B * S_Q * H].view(torch.float32).view(B, S_Q, H),
        ),
        V,
        "lse: overlaps out in memory, expected memory of its own",
    ),
    "workspace in out": (
        lambda: given(
            uniform,
            out=(out := zeros(B, S_Q, H, 512)),
            workspace=out.flatten().view(torch.uint8),
        ),
        V,
        "workspace: overlaps out in memory, expected memory of its own",
    ),
    # Numbers
    "scale of infinity": (
        lambda: given(uniform, scale=float("inf")),
        V,
        "scale: got inf, expected a finite number",
    ),
    "scale as a tensor": (
        lambda: given(uniform, scale=torch.tensor(0.1)),
        T,
        "scale: got a torch.Tensor, expected a number",
    ),
    "scale as text": (
        lambda: given(uniform, scale="0.1"),
        T,
        "scale: got '0.1', expected a number",
    ),
    "a max_seq_len that is no number": (
        lambda: given(uniform, max_seq_len="1"),
        TypeError,
        "max_seq_len: got '1', expected an int",
    ),
    "a max_seq_len below 0": (
        lambda: given(uniform, max_seq_len=-1),
        ValueError,
        "max_seq_len: got -1, expected 0 to 2^31 - 1",
    ),
    "an unknown variant": (
        lambda: given(uniform, variant="sm75"),
        V,
        "variant: got 'sm75' (forced by variant=), expected a pipeline (",
    ),
}

VALUES: dict[str, tuple[Callable[[], Arguments], str]] = {
    "negative length": (
        lambda: given(uniform, seq_lens=torch.tensor([5, -2, 64], dtype=torch.int32)),
        "seq_lens[1]: got -2, expected 0 to 64: block_table has 4 pages of 16 for a request",
    ),
    "length out of reach": (
        lambda: given(uniform, seq_lens=torch.tensor([5, 0, 65], dtype=torch.int32)),
        "seq_lens[2]: got 65, expected 0 to 64: block_table has 4 pages of 16 for a request",
    ),
    "page id of -1": (
        lambda: given(uniform, block_table=torch.full((B, MAX_PAGES), -1, dtype=torch.int32)),
        "block_table[0, 0]: got -1, expected 0 to 9: "
        "the cache has 10 pages, and the request's 5 tokens use 1",
    ),
    "page id past the pool": (
        lambda: given(
            uniform,
            block_table=torch.tensor(
                [[0, 99, 99, 99], [99, 99, 99, 99], [0, 1, 2, 10]], dtype=torch.int32
            ),
        ),
        "block_table[2, 3]: got 10, expected 0 to 9: "
        "the cache has 10 pages, and the request's 64 tokens use 4",
    ),
    "pool without pages": (
        lambda: given(uniform, kv_cache=zeros(0, PAGE_SIZE, 576)),
        "block_table[0, 0]: got 0, expected 0 to -1: "
        "the cache has 0 pages, and the request's 5 tokens use 1",
    ),
    "table without columns": (
        lambda: given(uniform, block_table=ints(B, 0)),
        "seq_lens[0]: got 5, expected 0 to 0: block_table has 0 pages of 16 for a request",
    ),
    "offsets from 1": (
        lambda: given(ragged, cu_seqlens_q=torch.tensor([1, 1, 1, 5], dtype=torch.int32)),
        "cu_seqlens_q[0]: got 1, expected 0",
    ),
    "offsets that fall": (
        lambda: given(ragged, cu_seqlens_q=torch.tensor([0, 3, 1, 5], dtype=torch.int32)),
        "cu_seqlens_q[2]: got 1, expected at least 3, the one before it",
    ),
    "offsets past the query": (
        lambda: given(ragged, cu_seqlens_q=torch.tensor([0, 1, 3, 6], dtype=torch.int32)),
        "cu_seqlens_q[3]: got 6, expected 5, the number of query tokens",
    ),
}
