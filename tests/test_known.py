"""Checks that are made once for calls that look alike."""

from __future__ import annotations

import pytest
import torch
from mla import known
from mla.known import once_per_layout
from torch import Tensor


class Counting:
    """A check that counts, and refuses tensors of three dimensions."""

    def __init__(self) -> None:
        self.calls = 0
        self.check = once_per_layout(self._check)

    def _check(self, tensor: Tensor, other: object = None) -> int:
        self.calls += 1
        if tensor.dim() == 3:
            raise ValueError("three")
        return tensor.numel()


def test_of_tensors_that_look_alike_it_is_one() -> None:
    counting = Counting()
    for _ in range(3):
        assert counting.check(torch.zeros(4, 8)) == 32
        assert counting.check(torch.zeros(4, 8), True) == 32
    assert counting.calls == 2


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(8, 4),
        torch.zeros(8, 4).T,
        torch.zeros(4, 8).half(),
        torch.zeros(4, 9)[:, 1:],
        torch.zeros(40)[1:33].view(4, 8),
        torch.zeros(4, 8, device="meta"),
    ],
    ids=["shape", "strides", "dtype", "gaps", "alignment", "device"],
)
def test_others_are_checked(other: Tensor) -> None:
    counting = Counting()
    counting.check(torch.zeros(4, 8))
    counting.check(other)
    assert counting.calls == 2


def test_what_it_raises_is_not_kept() -> None:
    counting = Counting()
    for calls in (1, 2):
        with pytest.raises(ValueError, match="three"):
            counting.check(torch.zeros(1, 1, 1))
        assert counting.calls == calls


def test_what_would_need_a_gradient_is_checked_each_time() -> None:
    counting = Counting()
    weight = torch.zeros(4, 8, requires_grad=True)
    for _ in range(2):
        counting.check(weight)
    assert counting.calls == 2
    with torch.no_grad():
        counting.check(weight)
        counting.check(torch.zeros(4, 8))
    assert counting.calls == 3


def test_what_is_no_tensor_is_checked_each_time() -> None:
    counting = Counting()
    for _ in range(2):
        counting.check(torch.zeros(4, 8), [1])
    assert counting.calls == 2


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "MOST", 2)
    counting = Counting()
    for _ in range(2):
        for n in range(3):
            counting.check(torch.zeros(n))
    assert counting.calls == 6
