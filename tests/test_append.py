"""append on a CPU, its arguments, and what its launch asks of the driver."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from appending import (
    CASES,
    MISTAKES,
    POISON,
    Append,
    Mistake,
    make_append,
    make_beyond_the_table,
    make_mistake,
)
from fake_driver import FastDivisor
from mla import _mla, reference
from mla.device import by_name

append_module = importlib.import_module("mla.append")  # the package's attribute is the function
BF16 = torch.bfloat16


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_rows_are_where_decode_looks(case: Append, dtype: torch.dtype | None) -> None:
    call = make_append(replace(case, dtype=dtype) if dtype else case)
    assert mla.append(**call.kwargs) is None
    call.check()


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_tokens_without_a_place_are_left_out(mistake: Mistake) -> None:
    call = make_mistake(mistake)
    mla.append(**call.kwargs)
    call.check()


def test_positions_beyond_the_table_are_left_out() -> None:
    call = make_beyond_the_table()
    mla.append(**call.kwargs)
    call.check()


def test_positions_beyond_the_angles_are_left_out() -> None:
    call = make_append(Append((5, 70)))
    call.kwargs["cos_sin"] = call.kwargs["cos_sin"][:70]
    page = call.kwargs["block_table"][1, 1]
    call.want[0][page, 6] = POISON
    mla.append(**call.kwargs)
    call.check()


@pytest.mark.parametrize("changes", [{"starts": (), "counts": ()}, {"counts": 0}])
def test_nothing_to_write(changes: dict[str, Any]) -> None:
    case = replace(Append((5, 70)), **changes)
    if not case.starts:
        latent = torch.zeros(0, 64, dtype=BF16)
        table = torch.zeros(0, 3, dtype=torch.int32)
        cache = torch.full((2, 4, 64), POISON, dtype=BF16)
        positions, cuts = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        mla.append(latent, None, cache, table, positions, cu_seqlens_q=cuts)
        assert (cache == POISON).all()
        return
    call = make_append(case)
    mla.append(**call.kwargs)
    call.check()


def test_a_table_without_pages() -> None:
    cache = torch.full((2, 4, 64), POISON, dtype=BF16)
    table, positions = torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    mla.append(torch.zeros(1, 1, 64, dtype=BF16), None, cache, table, positions)
    assert (cache == POISON).all()


def test_what_is_appended_is_what_decode_reads() -> None:
    call = make_append(Append((40, 11), counts=3, split=True))
    latent, rope = call.caches
    latent.zero_()
    rope.zero_()
    mla.append(**call.kwargs)
    lens = torch.tensor([43, 14], dtype=torch.int32)
    q = torch.randn(2, 3, 4, 576).to(BF16)
    table = call.kwargs["block_table"]
    got = mla.decode(q, (latent, rope), table, lens, scale=0.1)
    packed = torch.cat((latent, rope), -1)
    want, _ = reference.decode(q, packed, table, lens, scale=0.1)
    torch.testing.assert_close(got.double(), want, atol=1e-2, rtol=1e-2)
    rows = packed[table[0, 0].long(), 40:43]
    assert torch.equal(rows[:, :512], call.kwargs["latent"][0])


def good() -> dict[str, Any]:
    return make_append(Append((5, 70), page_size=16)).kwargs


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"latent": None}, TypeError, "latent: got NoneType, expected a torch.Tensor"),
        ({"rope": 3}, TypeError, "rope: got int"),
        ({"latent": torch.zeros(2, 1, 512).int()}, TypeError, "latent: got torch.int32, expected"),
        ({"rope": torch.zeros(2, 1, 64)}, TypeError, "rope: got torch.float32, expected torch.bf"),
        ({"latent": torch.zeros(2, 512, dtype=BF16)}, ValueError, r"latent: .* or cu_seqlens_q"),
        ({"latent": torch.zeros(2, 1, 12, dtype=BF16)}, ValueError, "latent: got 12 columns"),
        (
            {"rope": torch.zeros(3, 1, 64, dtype=BF16)},
            ValueError,
            r"rope: .* expected \[2, 1\] bef",
        ),
        (
            {"latent": torch.zeros(2, 1, 1024, dtype=BF16)[..., ::2]},
            ValueError,
            "latent: got stride 2 in its last dimension",
        ),
        (
            {"rope": torch.zeros(2, 1, 72, dtype=BF16)[..., 4:68]},
            ValueError,
            "rope: got data at byte 8 of 16",
        ),
        ({"rope": None}, ValueError, "kv_cache: got rows of 576, expected 512"),
        ({"kv_cache": torch.zeros(4, 16, 576)}, TypeError, "kv_cache: got torch.float32"),
        (
            {"kv_cache": torch.zeros(4, 16, 512, dtype=BF16)},
            ValueError,
            "kv_cache: got rows of 512",
        ),
        ({"kv_cache": torch.zeros(4, 0, 576, dtype=BF16)}, ValueError, "kv_cache: got shape"),
        ({"kv_cache": torch.zeros(4, 16, 2, 576, dtype=BF16)}, ValueError, "kv_cache: got shape"),
        (
            {"kv_cache": torch.zeros(1, 16, 576, dtype=BF16).expand(4, 16, 576)},
            ValueError,
            "kv_cache: got strides .* expected elements that do not overlap",
        ),
        (
            {"kv_cache": (torch.zeros(4, 16, 512, dtype=BF16),)},
            TypeError,
            "kv_cache: got 1 tensors",
        ),
        (
            {
                "kv_cache": (
                    torch.zeros(4, 16, 512, dtype=BF16),
                    torch.zeros(4, 8, 64, dtype=BF16),
                )
            },
            ValueError,
            r"rope cache: .* expected \[4, 16\] pages",
        ),
        ({"block_table": int32(2, 9).long()}, TypeError, r"block_table: .*\.to\(torch\.int32\)"),
        ({"block_table": int32(3, 9)}, ValueError, r"block_table: .* expected \[2, max_pages\]"),
        ({"positions": int32(2, 1).long()}, TypeError, "positions: got torch.int64"),
        ({"positions": int32(2)}, ValueError, r"positions: got shape \[2\], expected \[2, 1\]"),
        ({"positions": int32(2, 1).to("meta")}, ValueError, "positions: got device meta"),
        ({"cos_sin": torch.zeros(9, 64).half()}, TypeError, "cos_sin: got torch.float16, expected"),
        ({"cos_sin": torch.zeros(9, 32)}, ValueError, r"cos_sin: .* expected \[positions, 64\]"),
        ({"cos_sin": torch.zeros(9, 66)[:, :64]}, ValueError, "cos_sin: got strides"),
        ({"cu_seqlens_q": int32(3)}, ValueError, r"latent: .* expected \[tokens, columns\] with"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        mla.append(**good() | changes)


def test_other_wrong_arguments() -> None:
    ragged = make_append(Append((5, 70), counts=(1, 2))).kwargs
    with pytest.raises(TypeError, match=r"^cu_seqlens_q: got torch.int64"):
        mla.append(**ragged | {"cu_seqlens_q": ragged["cu_seqlens_q"].long()})
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: got shape \[0\]"):
        mla.append(**ragged | {"cu_seqlens_q": int32(0)})
    plain = make_append(Append((5, 70), r=8, rotated=False)).kwargs
    with pytest.raises(ValueError, match=r"^rope: got 8 columns, expected a multiple of 16"):
        mla.append(**plain | {"cos_sin": torch.zeros(9, 8), "interleaved": False})
    nothing = make_append(Append((5, 70), r=0, rotated=False)).kwargs
    with pytest.raises(ValueError, match=r"^cos_sin: got a tensor, expected None without rope"):
        mla.append(**nothing | {"cos_sin": torch.zeros(9, 8)})


def test_devices_without_memory_are_unsupported() -> None:
    call = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in good().items()}
    with pytest.raises(mla.UnsupportedError, match=r"^append: got tensors on meta, expected a CPU"):
        mla.append(**call)


def test_nothing_may_lie_under_the_cache() -> None:
    call = good()
    cache = torch.zeros(4, 16, 576, dtype=BF16)
    with pytest.raises(ValueError, match=r"^kv_cache: overlaps latent in memory"):
        mla.append(**call | {"kv_cache": cache, "latent": cache[0, :2, None, :512]})
    table = cache.view(torch.int32).flatten()[:18].view(2, 9)
    with pytest.raises(ValueError, match=r"^kv_cache: overlaps block_table in memory"):
        mla.append(**call | {"kv_cache": cache, "block_table": table})
    pair = (cache[..., :512], cache[..., 448:512])
    with pytest.raises(ValueError, match=r"^rope cache: overlaps latent cache"):
        mla.append(**call | {"kv_cache": pair})
    mla.append(**call | {"kv_cache": (cache[..., :512], cache[..., 512:])})


def test_gradients_are_refused() -> None:
    call = good()
    with pytest.raises(ValueError, match=r"^latent: requires grad"):
        mla.append(**call | {"latent": call["latent"].clone().requires_grad_()})


class TestLaunch:
    """CPU tensors that pass for those of a GPU; what the extension is asked is recorded."""

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        recorded: list[tuple[Any, ...]] = []
        monkeypatch.setattr(append_module, "facts", lambda device: by_name("A100"))
        monkeypatch.setattr(append_module.launch, "stream_of", lambda device: 77)
        monkeypatch.setattr(_mla, "launch_append", lambda *arguments: recorded.append(arguments))
        return recorded

    def test_uniform(self, launches: list[tuple[Any, ...]]) -> None:
        call = make_append(Append((5, 70, 9), counts=2, page_size=16, strided=True))
        given = call.kwargs
        mla.append(**given)
        ((dtype, addresses, strides, sizes, interleaved, device, stream),) = launches
        (cache,) = call.caches
        tensors = [given["latent"], given["rope"], cache, cache[..., 512:]]
        tensors += [given["block_table"], given["positions"]]
        assert addresses == [t.data_ptr() for t in tensors] + [0, given["cos_sin"].data_ptr()]
        new, pages = given["latent"].stride()[:2], cache.stride()[:2]
        table = given["block_table"]
        assert strides == [*new, *new, 2, 1, *pages, *pages, table.stride(0), 64]
        assert sizes == [6, 3, 2, table.shape[1], cache.shape[0], 16, 700, 512, 64]
        assert (dtype, interleaved, device, stream) == ("bfloat16", True, 0, 77)
        assert (cache == POISON).all()

    def test_ragged_and_split(self, launches: list[tuple[Any, ...]]) -> None:
        case = Append((5, 70, 9), counts=(2, 0, 3), split=True, dtype=torch.float16)
        call = make_append(replace(case, rotated=False, interleaved=False))
        given = call.kwargs
        mla.append(**given)
        ((dtype, addresses, strides, sizes, interleaved, *_),) = launches
        assert addresses[2:4] == [cache.data_ptr() for cache in call.caches]
        assert addresses[6:] == [given["cu_seqlens_q"].data_ptr(), 0]
        assert strides[:6] == [0, 576, 0, 576, 0, 1]
        assert strides[6:10] == [64 * 512, 512, 64 * 64, 64]
        assert (sizes[:3], sizes[6:], strides[11]) == ([5, 3, 0], [0, 512, 64], 0)
        assert (dtype, interleaved) == ("float16", False)

    def test_without_rope(self, launches: list[tuple[Any, ...]]) -> None:
        mla.append(**make_append(Append((9, 8), r=0, rotated=False)).kwargs)
        ((_, addresses, strides, sizes, *_),) = launches
        assert (addresses[1], addresses[3], sizes[8]) == (0, 0, 0)
        assert strides[2:4] == strides[8:10] == [0, 0]

    def test_of_no_tokens_is_none(self, launches: list[tuple[Any, ...]]) -> None:
        mla.append(**make_append(Append((9, 8), counts=0)).kwargs)
        assert launches == []

    def test_dtypes_of_the_kernel(self, launches: list[tuple[Any, ...]]) -> None:
        with pytest.raises(TypeError, match=r"^latent: got torch.float32, expected torch.bf"):
            mla.append(**make_append(Append((9, 8), dtype=torch.float32)).kwargs)

    def test_old_gpus_are_unsupported(
        self, launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        turing = replace(by_name("A100"), name="T4", sm=75)  # type: ignore[type-var]
        monkeypatch.setattr("mla.append_inputs.facts", lambda device: turing)
        with pytest.raises(mla.UnsupportedError, match=r"T4 .* compute capability 8.0 or later"):
            mla.append(**good())


ADDRESSES = (
    *("latent", "rope", "latent_cache", "rope_cache"),
    *("block_table", "positions", "cu_seqlens_q", "cos_sin"),
)
STRIDES = (
    *("latent_batch", "latent_token", "rope_batch", "rope_token"),
    *("positions_batch", "positions_token", "latent_page", "latent_slot"),
    *("rope_page", "rope_slot", "block_table_stride", "cos_sin_stride"),
)
COUNTS = (
    *("num_tokens", "num_requests", "s_q", "max_pages", "num_pages", "page_size"),
    *("num_angles", "latent_chunks", "rope_chunks", "interleaved"),
)


class AppendParams(ctypes.Structure):
    """kernels/common/append.h once more."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ADDRESSES),
        *((name, ctypes.c_int64) for name in STRIDES),
        *((name, ctypes.c_int32) for name in COUNTS),
        *((name, FastDivisor) for name in ("by_page_size", "by_s_q")),
    ]


CALL = """
addresses = [0x1000 * (i + 1) for i in range(8)]
strides = [1000 * (i + 1) for i in range(12)]
sizes = [7, 3, 0, 11, 13, 17, 19, 512, 64]
dtype, interleaved = "bfloat16", False
{change}
_mla.launch_append(dtype, addresses, strides, sizes, interleaved, 1, 0xabc)
"""


@pytest.mark.parametrize(("dtype", "entry"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_what_the_driver_is_asked(run: Any, dtype: str, entry: str) -> None:
    (launch,) = run(CALL.format(change=f"dtype = {dtype!r}")).named("launch")
    assert launch["kernel"] == f"mla_append_{entry}"
    assert (launch["grid"], launch["block"], launch["smem"]) == (2, 128, 0)
    assert (launch["stream"], launch["device"]) == (0xABC, 1)
    (parameters,) = launch["parameters"]
    got = AppendParams.from_buffer_copy(bytes.fromhex(parameters))
    assert ctypes.sizeof(got) == len(parameters) // 2
    assert [getattr(got, name) for name in ADDRESSES] == [0x1000 * (i + 1) for i in range(8)]
    assert [getattr(got, name) for name in STRIDES] == [1000 * (i + 1) for i in range(12)]
    assert [getattr(got, name) for name in COUNTS] == [7, 3, 0, 11, 13, 17, 19, 64, 8, 0]
    assert [got.by_page_size.divide(n) for n in range(300)] == [n // 17 for n in range(300)]


@pytest.mark.parametrize("capturing", [False, True])
def test_it_is_a_graph_unless_captured(run: Any, capturing: bool) -> None:
    knobs = {"FAKE_CUDA_CAPTURING": str(int(capturing))}
    (launch,) = run(CALL.format(change=""), **knobs).named("launch")
    assert (launch["graph"] > 0) != capturing


def test_a_uniform_launch(run: Any) -> None:
    change = "addresses[6] = 0; sizes[:3] = [12, 4, 3]; interleaved = True"
    (launch,) = run(CALL.format(change=change)).named("launch")
    got = AppendParams.from_buffer_copy(bytes.fromhex(launch["parameters"][0]))
    assert (launch["grid"], got.cu_seqlens_q, got.interleaved) == (3, 0, 1)
    assert [got.by_s_q.divide(n) for n in range(12)] == [n // 3 for n in range(12)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sizes[0] = 0", "tokens must be 1 to 2^31 - 1"),
        ("sizes[1] = 0", "requests must be 1 to 2^31 - 1"),
        ("addresses[6] = 0", "s_q must be 1 to 2^31 - 1"),
        ("addresses[6] = 0; sizes[2] = 2", "tokens must be requests * s_q"),
        ("sizes[5] = 0", "page_size must be 1 to 2^31 - 1"),
        ("sizes[4] = 2**31", "pages must be 0 to 2^31 - 1"),
        ("sizes[7] = 12", "latent columns must be multiples of 8"),
        ("sizes[8] = 8", "rope columns must be multiples of 16"),
        ("dtype = 'float32'", "float32"),
    ],
)
def test_what_the_extension_refuses(run: Any, change: str, message: str) -> None:
    call = CALL.format(change=change).replace("_mla.launch_append(", "    _mla.launch_append(")
    call = call.replace(f"{change}\n", f"{change}\ntry:\n")
    done = run(f"{call}except (ValueError, IndexError) as error:\n    print(error)\n")
    assert message in done.printed
    assert not done.named("launch")
