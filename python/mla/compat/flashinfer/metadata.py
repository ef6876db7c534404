"""The requests of a plan, in FlashInfer's two forms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...checks import wrong

CSR = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
DENSE = ("cum_seq_lens_q", "block_tables", "seq_lens")


@dataclass(frozen=True)
class MLAPlanMetadata:
    """The requests of a plan: `csr`, `dense`, or both forms of the same ones.

    Int32 tensors on the wrapper's device or on a CPU. With both, the dense form is read.
    """

    qo_indptr: Tensor | None = None
    kv_indptr: Tensor | None = None
    kv_indices: Tensor | None = None
    kv_len_arr: Tensor | None = None
    cum_seq_lens_q: Tensor | None = None
    block_tables: Tensor | None = None
    seq_lens: Tensor | None = None
    max_q_len: int | None = None  # nothing here depends on it

    @classmethod
    def csr(
        cls, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor
    ) -> MLAPlanMetadata:
        """qo_indptr [b + 1]: where each request's query tokens begin and end.

        kv_indptr [b + 1]: where its pages do in kv_indices [kv_indptr[b] or more].
        kv_len_arr [b]: its KV tokens.
        """
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)

    @classmethod
    def dense(
        cls,
        cum_seq_lens_q: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        max_q_len: int | None = None,
    ) -> MLAPlanMetadata:
        """cum_seq_lens_q [b + 1]: where each request's query tokens begin and end.

        block_tables [b, max_pages]: its pages. seq_lens [b]: its KV tokens.
        """
        return cls(
            cum_seq_lens_q=cum_seq_lens_q,
            block_tables=block_tables,
            seq_lens=seq_lens,
            max_q_len=max_q_len,
        )

    @classmethod
    def dual(
        cls,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        *,
        cum_seq_lens_q: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        max_q_len: int | None = None,
    ) -> MLAPlanMetadata:
        """Both forms of the same requests."""
        return cls(
            qo_indptr,
            kv_indptr,
            kv_indices,
            kv_len_arr,
            cum_seq_lens_q,
            block_tables,
            seq_lens,
            max_q_len,
        )


def one_form(metadata: MLAPlanMetadata | None, flat: MLAPlanMetadata) -> MLAPlanMetadata:
    """Of requests that came as metadata, or flat: as arguments of their own."""
    given = [name for name, value in vars(flat).items() if value is not None]
    if metadata is None:
        if any(name in CSR for name in given) and any(name in DENSE for name in given):
            raise wrong(
                "metadata", f"none and {', '.join(given)}", "one form, or metadata for both"
            )
        return flat
    if not isinstance(metadata, MLAPlanMetadata):
        raise TypeError(f"metadata: got {type(metadata).__name__}, expected an MLAPlanMetadata")
    if given:
        raise wrong("metadata", f"it and {', '.join(given)}", "one of both")
    return metadata
