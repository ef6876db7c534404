"""Arguments that FlashInfer takes in more than one form."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...checks import D_V, check_size, wrong
from ...inputs import TensorOrPair
from .unsupported import refuse_dtypes

Pair: TypeAlias = tuple[Tensor, Tensor]
# Packed or split, or both at once in either order.
Structural: TypeAlias = Tensor | Pair | tuple[Tensor, Pair] | tuple[Pair, Tensor]


class Sizes(NamedTuple):
    """Of a plan, with FlashInfer's names: what all plans of a wrapper for graphs share."""

    num_heads: int
    head_dim_ckv: int
    head_dim_kpe: int
    page_size: int
    q_data_type: torch.dtype
    kv_data_type: torch.dtype

    @classmethod
    def of(cls, *given: Any) -> Sizes:
        """TypeError, ValueError and UnsupportedError for what no plan can have."""
        check_needed(**dict(zip(cls._fields, given, strict=True)))
        sizes = cls(*given)
        for name in ("num_heads", "head_dim_ckv", "page_size"):
            check_size(name, getattr(sizes, name), 1)
        d_v, rope = sizes.head_dim_ckv, check_size("head_dim_kpe", sizes.head_dim_kpe, 0)
        if D_V.get(d_v + rope) != d_v:
            known = ", ".join(f"{v} + {k - v}" for k, v in D_V.items())
            raise wrong("head_dim_ckv + head_dim_kpe", f"{d_v} + {rope}", f"one of {known}")
        refuse_dtypes(sizes.q_data_type, sizes.kv_data_type)
        return sizes

    def check_same(self, first: Sizes | None) -> None:
        """As those of the wrapper's first plan, by which graphs were captured."""
        for name, now, before in zip(self._fields, self, first or self, strict=True):
            if now != before:
                raise wrong(name, now, f"{before} as in the first plan of a wrapper for graphs")


def check_choice(name: str, value: object, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise wrong(name, repr(value), f"one of {', '.join(repr(v) for v in known if v)}")


def check_needed(**arguments: object) -> None:
    """What every form needs has a default all the same, as they share a signature."""
    for name, value in arguments.items():
        if value is None:
            raise TypeError(f"{name}: got None, expected a value in every form of plan()")


def structural(
    name: str, value: Structural | None, flat: dict[str, Tensor | None], rope: int
) -> TensorOrPair:
    """What `decode` takes: `value`, or the two tensors that may come in its place.

    Without rope columns the second of a pair is empty, and left out.
    """
    given = [tensor for tensor in flat.values() if tensor is not None]
    if value is not None and given:
        raise TypeError(f"{name}: got it and {' or '.join(flat)}, expected one of both")
    if value is None:
        if len(given) < (2 if rope else 1):
            raise TypeError(f"{name}: got None, expected it, or {' and '.join(flat)}")
        value = (given[0], given[-1])
    if isinstance(value, tuple) and len(value) == 2:
        first, second = value
        if isinstance(first, tuple):
            return second
        return first if isinstance(second, tuple) or not rope else (first, second)
    return value


def base_is_e(planned: str | None, asked: bool) -> bool:
    """Of lse: as planned, or as `run` was asked where that is left to it (None)."""
    if planned == "none":
        raise wrong("lse_mode", "'none' in plan()", "'base2' or 'basee' where run() returns lse")
    if planned == "base2" and asked:
        raise wrong("return_lse_base_on_e", True, "False after plan() with lse_mode='base2'")
    return asked or planned == "basee"
