"""What a call asks for in numbers: all that the choice of a variant depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _mla
from .checks import D_V, DTYPES, INT32_MAX, check_dims, check_size, dtype_name, wrong
from .inputs import Inputs

# Of all requests. Kernels count them in int32, rounded up to whole row blocks: by less than this.
MAX_ROWS = INT32_MAX - 1023


class Kind(NamedTuple):
    """What of a problem decides which variants can run it."""

    dtype: torch.dtype
    d_qk: int
    d_v: int
    page_size: int


class Problem(NamedTuple):
    """The sizes of one decode call."""

    b: int  # requests
    s_q: int  # query tokens of each request; 0 when ragged
    total_q: int  # query tokens of all requests
    h_q: int
    d_qk: int
    d_v: int
    dtype: torch.dtype
    page_size: int
    max_pages: int  # columns of the block table
    ragged: bool = False
    batch_invariant: bool = False
    max_seq_len: int | None = None  # of the longest request, as the caller says; rounded up

    @property
    def kind(self) -> Kind:
        return Kind(self.dtype, self.d_qk, self.d_v, self.page_size)

    @property
    def max_len(self) -> int:
        """KV tokens that a row of the block table reaches, or kernels can count."""
        return min(self.max_pages * self.page_size, _mla.MAX_LEN)

    @property
    def likely_len(self) -> int:
        """KV tokens that a request counts with where lengths are not known (src/chooser.h)."""
        said = -1 if self.max_seq_len is None else self.max_seq_len
        return _mla.likely_len(self.max_len, self.page_size, said)

    @property
    def rows(self) -> int:
        """Query rows (token, head) of a request; the average when they are ragged."""
        return -(-self.total_q * self.h_q // max(self.b, 1))

    def without_batch(self) -> Problem:
        """What a variant is chosen by in the batch-invariant mode: heads, dims and dtype.

        Not query tokens, as those of a ragged request are known on the device only. It has the work
        of a large batch, one request that fills any GPU, and as many query tokens as speculation
        brings: tiles that are too low for them take up to three times as long, and those that are
        too high for one token 1 % (H200, 16 heads) to 7 % (predicted, RTX 4090).
        """
        return self._replace(
            b=1,
            s_q=4,
            total_q=4,
            page_size=64,
            max_pages=1 << 14,
            ragged=False,
            max_seq_len=None,
        )

    @classmethod
    def from_tensors(
        cls,
        inputs: Inputs,
        d_v: int | None = None,
        batch_invariant: bool = False,
        max_seq_len: int | None = None,
    ) -> Problem:
        """The problem of a call. Checks all that needs no tensor's values.

        Raises TypeError for a wrong type or dtype, ValueError for the rest.
        """
        inputs.check(d_v)
        q, ragged = inputs.q, inputs.cu_seqlens_q is not None
        shape, d_qk = q.shape, inputs.d_qk
        return _countable(
            cls(
                b=inputs.seq_lens.shape[0],
                s_q=0 if ragged else shape[1],
                total_q=shape[0] if ragged else shape[0] * shape[1],
                h_q=shape[-2],
                d_qk=d_qk,
                d_v=D_V[d_qk],
                dtype=q.dtype,
                page_size=inputs.kv.shape[1],
                max_pages=inputs.block_table.shape[1],
                ragged=ragged,
                batch_invariant=bool(batch_invariant),
                max_seq_len=_rounded(max_seq_len),
            )
        )

    @classmethod
    def from_sizes(
        cls,
        *,
        b: int,
        h_q: int,
        d_qk: int,
        dtype: torch.dtype,
        page_size: int,
        max_pages: int,
        s_q: int = 1,
        total_q: int | None = None,
        d_v: int | None = None,
        batch_invariant: bool = False,
        max_seq_len: int | None = None,
    ) -> Problem:
        """A problem without tensors. A `total_q` makes the query ragged and `s_q` meaningless."""
        ragged = total_q is not None
        b = check_size("b", b, 0)
        s_q = 0 if ragged else check_size("s_q", s_q, 0)
        dtype_name(dtype)
        check_dims("d_qk", d_qk, d_v)
        return _countable(
            cls(
                b=b,
                s_q=s_q,
                total_q=b * s_q if total_q is None else check_size("total_q", total_q, 0),
                h_q=check_size("h_q", h_q, 1),
                d_qk=d_qk,
                d_v=D_V[d_qk],
                dtype=dtype,
                page_size=check_size("page_size", page_size, 1),
                max_pages=check_size("max_pages", max_pages, 0),
                ragged=ragged,
                batch_invariant=bool(batch_invariant),
                max_seq_len=_rounded(max_seq_len),
            )
        )

    def __str__(self) -> str:
        query = f"{self.total_q} ragged query tokens" if self.ragged else f"s_q={self.s_q}"
        mode = ", batch-invariant" if self.batch_invariant else ""
        length = "" if self.max_seq_len is None else f", expected to have {self.likely_len}"
        return (
            f"b={self.b}, {query}, h_q={self.h_q}, up to {self.max_len} KV tokens{length}, "
            f"page_size={self.page_size}, d_qk={self.d_qk}, d_v={self.d_v}, "
            f"{DTYPES[self.dtype]}{mode}"
        )


def _rounded(max_seq_len: int | None) -> int | None:
    """Up, so that a length that grows with every step is a new call only now and then."""
    if max_seq_len is None:
        return None
    return _mla.rounded_length(check_size("max_seq_len", max_seq_len, 0))


def _countable(problem: Problem) -> Problem:
    """The same; ValueError if kernels cannot count it."""
    if problem.b > INT32_MAX:
        raise wrong("seq_lens", f"{problem.b} requests", "fewer than 2^31")
    tokens = max(problem.s_q, problem.total_q)
    if tokens * problem.h_q > MAX_ROWS:
        got = f"{tokens} query tokens of {problem.h_q} heads"
        raise wrong("q", got, f"at most {MAX_ROWS} query rows (token, head)")
    return problem
