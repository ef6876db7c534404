"""The kernel that only reads must read everything."""

from __future__ import annotations

import pytest
import torch
from mla import _mla
from mla.launch import stream_of


@pytest.mark.parametrize("words", [4, 2048 * 4 - 4, 3 * 10**6])
@pytest.mark.parametrize("ctas", [1, 7, 528])
def test_the_sum_is_of_all_words(needs_gpu: None, words: int, ctas: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    data = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=device)
    total = torch.zeros((), dtype=torch.int32, device=device)
    _mla.launch_stream(
        data.data_ptr(), data.nbytes, total.data_ptr(), ctas, device.index, stream_of(device)
    )
    bits = torch.arange(32, device=device, dtype=torch.int32)
    odd = ((data[:, None] >> bits) & 1).sum(dim=0) % 2  # of each bit: whether it is set odd times
    want = int((odd << torch.arange(32, device=device)).sum())
    assert int(total) & 0xFFFFFFFF == want
