"""What the shipped images hold, disassembled: architectures, instructions, registers, parameters.

Needs no GPU. The tools come from PyPI (extra `test`); without them the tests fail, not skip.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import nvidia
import pytest
from mla import _mla

GPU_VARIANTS = [v for v in _mla.variants() if v["pipeline"] != "cpu"]
COMMON = ("plan", "plan_parts", "combine")
SINCE = {"sm80": "before_sm90", "sm90": "from_sm90"}  # images of common kernels, and their targets
IMAGES = [
    *(f"{kernel}_{since}" for kernel in COMMON for since in SINCE),
    "append",
    "merge",
    "stream",
    "empty",
    *(v["name"] for v in GPU_VARIANTS),
]
each_image = pytest.mark.parametrize("image", IMAGES)


def each_variant(*pipelines: str) -> pytest.MarkDecorator:
    """Once for each row of these pipelines, or of all whose names begin so."""
    rows = [v for v in GPU_VARIANTS if v["pipeline"].startswith(pipelines)]
    return pytest.mark.parametrize("variant", rows, ids=lambda v: v["name"])


MACHINE_ARCHS = {
    "any": {"sm_80", "sm_86", "sm_90a", "sm_120"},
    "ampere_163k": {"sm_80", "sm_90a"},
    "ampere_99k": {"sm_86", "sm_120"},
    "hopper": {"sm_90a"},
    "before_sm90": {"sm_80", "sm_86"},
    "from_sm90": {"sm_90a", "sm_120"},
}
PTX_VERSION = (8, 0)  # CUDA 12.0's
# Version of the machine code's container: drivers before 580 refuse 8, but for chips that always
# had it.
ELF_VERSIONS = {"525": (1, 7), "580": (1, 8)}
ALWAYS_ELF_8 = {"sm_120"}
REGISTERS_PER_SM = 65536
MAX_REGISTERS = 255


class Function(NamedTuple):
    """A function of one architecture's machine code."""

    arch: str
    name: str
    registers: int
    stack: int
    local: int


@cache
def cuobjdump(image: str, *options: str) -> str:
    """The output of cuobjdump for an embedded image."""
    folders = [Path(root, "cu13/bin") for root in nvidia.__path__]
    tools = next(path for path in folders if (path / "cuobjdump").is_file())
    assert (tools / "nvdisasm").is_file()
    with TemporaryDirectory() as folder:
        file = Path(folder, "image.fatbin")
        file.write_bytes(_mla.image(image))
        done = subprocess.run(
            [tools / "cuobjdump", *options, file],
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                "PATH": f"{tools}:{os.environ['PATH']}",
            },
        )
    return done.stdout


def parts(image: str, option: str) -> list[tuple[str, str, tuple[int, int], str]]:
    """Kind ("elf" or "ptx"), architecture, container version and text of each part of an image."""
    texts = re.split(r"^Fatbin (elf|ptx) code:$", cuobjdump(image, option), flags=re.MULTILINE)
    found = []
    for kind, text in zip(texts[1::2], texts[2::2], strict=True):
        arch = re.search(r"^arch = (\w+)$", text, re.MULTILINE)
        version = re.search(r"^code version = \[(\d+),(\d+)\]$", text, re.MULTILINE)
        assert arch
        assert version
        found.append((kind, arch[1], (int(version[1]), int(version[2])), text))
    return found


def functions(image: str) -> list[Function]:
    pattern = r"^ Function (\w+):\n\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    return [
        Function(arch, name, int(registers), int(stack), int(local))
        for kind, arch, _, text in parts(image, "-res-usage")
        if kind == "elf"
        for name, registers, stack, local in re.findall(pattern, text, re.MULTILINE)
    ]


def instructions(image: str) -> dict[tuple[str, str], Counter[str]]:
    """How often each instruction occurs, by architecture and function."""
    instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)"
    return {
        where: Counter(re.findall(instruction, text, re.MULTILINE))
        for where, text in code(image).items()
    }


def code(image: str) -> dict[tuple[str, str], str]:
    """The disassembly by architecture and function."""
    texts = {}
    for kind, arch, _, text in parts(image, "-sass"):
        if kind == "elf":
            names = re.split(r"^\s+Function : (\w+)$", text, flags=re.MULTILINE)[1:]
            texts |= {
                (arch, name): body for name, body in zip(names[::2], names[1::2], strict=True)
            }
    return texts


def entry_points(image: str) -> set[str]:
    if image.startswith("plan_parts"):
        return {"mla_plan_parts_small", "mla_plan_parts_large"}
    if image.startswith("plan"):
        sizes = ("few", "small", "large")
        return {f"mla_plan_{size}{q}" for size in sizes for q in ("", "_ragged")}
    if image.startswith("combine"):
        return {
            f"mla_combine_{t}_v{d_v}_{tasks}"
            for t in ("bf16", "fp16")
            for d_v in (512, 256)
            for tasks in ("few", "many")
        }
    if image == "append":
        return {"mla_append_bf16", "mla_append_fp16"}
    if image == "merge":
        types = ("bf16", "fp16", "fp32")
        return {f"mla_merge_{t}{end}" for t in types for end in ("", "_unaligned")}
    if image in ("stream", "empty"):
        return {f"mla_{image}"}
    return {f"mla_{image}_{t}" for t in ("bf16", "fp16")}


def targets(image: str) -> str:
    for variant in GPU_VARIANTS:
        if variant["name"] == image:
            return str(variant["targets"])
    return SINCE.get(image.rsplit("_")[-1], "any")


@each_image
def test_architectures_and_ptx(image: str) -> None:
    found = parts(image, "-res-usage")
    assert {arch for kind, arch, *_ in found if kind == "elf"} == MACHINE_ARCHS[targets(image)]
    elf_version = ELF_VERSIONS[_mla.build_info()["min_driver"]]
    for kind, arch, version, _ in found:
        if kind == "elf":
            assert version == ((1, 8) if arch in ALWAYS_ELF_8 else elf_version), arch
    ptx = [(arch, version) for kind, arch, version, _ in found if kind == "ptx"]
    of = {"hopper": [], "from_sm90": [("sm_90", PTX_VERSION)]}
    assert ptx == of.get(targets(image), [("sm_80", PTX_VERSION)])


@each_image
def test_every_architecture_has_every_entry_point(image: str) -> None:
    found = {(f.arch, f.name) for f in functions(image)}
    archs = MACHINE_ARCHS[targets(image)]
    assert found == {(arch, name) for arch in archs for name in entry_points(image)}


@each_image
def test_nothing_is_kept_in_local_memory(image: str) -> None:
    assert [f for f in functions(image) if f.stack or f.local] == []
    counted = instructions(image)
    assert set(counted) == {(f.arch, f.name) for f in functions(image)}
    for where, counts in counted.items():
        least = 10 if image == "empty" else 50
        assert sum(counts.values()) > least, where  # the disassembly was understood
        assert not [op for op in counts if op.startswith(("LDL", "STL"))], where


@each_image
def test_registers_leave_room_for_a_block(image: str) -> None:
    warps = {v["name"]: v["warps"] for v in GPU_VARIANTS}
    warps |= {f"{kernel}_{since}": 16 for kernel in ("plan", "plan_parts") for since in SINCE}
    warps["stream"] = 16
    for function in functions(image):
        assert 0 < function.registers <= MAX_REGISTERS, function
        allocated = -(-function.registers // 8) * 8  # granted in eights
        assert allocated * 32 * warps.get(image, 8) <= REGISTERS_PER_SM, function


@each_image
def test_parameters_are_what_the_host_passes(image: str) -> None:
    params, combined, lengths, shape, pointer, limits = _mla.PARAMS_BYTES, 136, 40, 12, 8, 12
    planner, combine = [lengths, shape, 4, pointer], [combined, shape]
    wanted = {"append": [216], "merge": [240], "stream": [pointer, 8, pointer]}
    for since in SINCE:
        wanted |= {f"plan_{since}": planner, f"plan_parts_{since}": [*planner, limits]}
        wanted |= {f"combine_{since}": combine}
    for kind, arch, _, text in parts(image, "-elf"):
        if kind != "elf":
            continue
        # One section of attributes per kernel, up to the next section.
        pattern = r"^\.nv\.info\.(mla_\w+)$(.*?)(?=^\.\w|\Z)"
        sizes = {}
        for name, section in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
            found = re.findall(r"Ordinal : 0x(\w+).*?Size\s+: 0x(\w+)", section)
            sizes[name] = [size for _, size in sorted((int(o, 16), int(s, 16)) for o, s in found)]
        assert set(sizes) == entry_points(image), arch
        assert set(map(tuple, sizes.values())) == {tuple(wanted.get(image, [params]))}, arch


@each_image
def test_no_bound_decides_a_comparison_as_well(image: str) -> None:
    """ptxas makes VIMNMX.RELU of max(0, min(x, n)); its predicate, for "== n", is wrong."""
    for where, text in code(image).items():
        assert not re.search(r"\bVIMNMX\S*\.RELU\S* R\w+, (?!PT,)U?P\w,", text), where


def test_combine_waits_for_little() -> None:
    """It has read the plan ahead of its wait, and asks for parts right behind it; it divides by
    nothing but sums, and meets one barrier: who starts last holds up all."""
    for where, text in code("combine_sm90").items():
        assert text.count("BAR.SYNC") == 1, where
        assert "I2F" not in text, where  # of a division of integers
        if where[0] != "sm_90a":
            continue
        ahead, behind = text.split("ACQBULK")
        assert ahead.count("LDG.E.128") == 2, where  # the item
        first_part = behind[: behind.index("LDG.E.128")]
        assert "MUFU.RCP" not in first_part, where
        assert first_part.count("LDG.E ") == 4, where  # log-sum-exps, which are needed first


@each_variant("sm80")
def test_sm80_uses_the_units_it_is_written_for(variant: dict[str, Any]) -> None:
    """Tensor cores, asynchronous copies past the registers, matrix loads."""
    for (arch, name), counts in instructions(variant["name"]).items():
        element = "HMMA.16816.F32.BF16" if name.endswith("_bf16") else "HMMA.16816.F32"
        mma = {op: n for op, n in counts.items() if op.startswith("HMMA")}
        assert set(mma) == {element}, (arch, name)
        per_warp_columns = variant["d_v"] // variant["warps"] // 8
        assert mma[element] >= per_warp_columns * variant["block_n"] // 16, (arch, name)
        copies = [op for op in counts if op.startswith("LDGSTS")]
        assert copies, (arch, name)
        for op in copies:
            assert op.startswith("LDGSTS.E.BYPASS"), (arch, name)
            assert op.endswith(".128"), (arch, name)
        loads = {op for op in counts if op.startswith("LDSM")}
        assert loads, (arch, name)
        assert any("MT88" in op for op in loads), "V is read transposed"


@each_variant("sm80")
def test_sm80_groups_of_warps_wait_for_kv_and_for_themselves(variant: dict[str, Any]) -> None:
    """Warps wait for their own copies or at mbarriers; few barriers are those of the whole CTA."""
    group_warps = variant["d_v"] // 128 if variant["block_rows"] == 16 else 4
    group_threads, groups = 32 * group_warps, variant["warps"] // group_warps
    ring_bytes = variant["stages"] // groups * variant["block_n"] * (variant["d_qk"] + 8) * 2
    own_copies = variant["block_rows"] == 16 and ring_bytes <= 64 << 10
    warp_arrivals = (variant["block_rows"], variant["block_n"], variant["d_v"]) == (64, 16, 512)
    # To begin, if there are mbarriers; to give and take O at the end of a piece, twice with more
    # than two groups.
    cta_barriers = (not own_copies) + 2 * (variant["block_rows"] == 16) * min(groups - 1, 2)
    for (arch, name), text in code(variant["name"]).items():
        barriers = re.findall(r"\bBAR\.SYNC\S* (R?\w+)(?:, (\w+))? ;", text)
        of_group = [threads for number, threads in barriers if number != "0x0"]
        assert set(of_group) == {hex(group_threads)}, (arch, name)
        assert len(barriers) == len(re.findall(r"\bBAR\.", text)), (arch, name)
        assert len(barriers) - len(of_group) == cta_barriers, (arch, name)
        # Since sm_90 mbarriers have instructions of their own, before they are words in memory.
        arrive, wait = (
            (r"ATOMS\.ARRIVE\.64", r"\bLDS")
            if arch in ("sm_80", "sm_86")
            else (r"SYNCS\.ARRIVE", r"SYNCS\.PHASECHK")
        )
        # How copies are known to have landed, and who waits for another warp's.
        present = {
            r"\bDEPBAR\.LE SB0, 0x[1-9a-f]": own_copies or warp_arrivals,
            r"ARRIVES\.LDGSTSBAR\.64": not own_copies and not warp_arrivals,
            arrive: not own_copies,
            wait: True if wait == r"\bLDS" else not own_copies,
        }
        for op, expected in present.items():
            assert bool(re.search(op, text)) == expected, (arch, name, op)


@each_variant("sm90_")
def test_sm90_uses_the_units_it_is_written_for(variant: dict[str, Any]) -> None:
    """wgmma alone for the products, boxes by TMA and rows by cp.async, barriers in memory."""
    for (arch, name), counts in instructions(variant["name"]).items():
        element = "F32.BF16" if name.endswith("_bf16") else "F32"
        mma = {op: n for op, n in counts.items() if "MMA" in op}
        assert all(re.fullmatch(rf"HGMMA\.64x\d+x16\.{element}", op) for op in mma), (arch, name)
        # The k-steps of one tile, if nothing were unrolled or shared.
        least = variant["d_qk"] // 16 + variant["block_n"] // 16
        assert sum(mma.values()) >= least, (arch, name)
        assert [op for op in counts if op.startswith("UTMALDG.3D")], (arch, name)
        assert not [op for op in counts if "MULTICAST" in op], (arch, name)
        copies = [op for op in counts if op.startswith("LDGSTS")]
        assert copies, (arch, name)
        for op in copies:
            assert op.startswith("LDGSTS.E.BYPASS"), (arch, name)
            assert op.endswith(".128"), (arch, name)
        assert [op for op in counts if op.startswith("STSM")], "P goes to shared memory by stmatrix"
        assert [op for op in counts if op.startswith("SYNCS.PHASECHK")], "mbarriers are waited for"
        transposes = [op for op in counts if op.startswith("MOVM.16.MT88")]
        assert bool(transposes) == (variant["pipeline"] == "sm90_swap"), "O^T becomes O"


@pytest.mark.parametrize("image", ["plan_sm90", "plan_parts_sm90", "combine_sm90"])
def test_common_kernels_take_part_in_dependent_launches(image: str) -> None:
    """The planner lets the next kernel start at once; the combine kernel waits."""
    for where, text in code(image).items():
        if image.startswith("plan"):
            assert text.index("PREEXIT") < text.index("LDG"), where
            assert "ACQBULK" not in text, where
        else:
            assert "ACQBULK" in text, where


@each_variant("sm90_")
def test_sm90_waits_for_the_planner(variant: dict[str, Any]) -> None:
    """Ahead of its loads, but for those of partial results, which are strong. The combine kernel
    may start, and read the plan, once all CTAs have waited."""
    for where, text in code(variant["name"]).items():
        loads = re.compile(r"\bLDG\.(?!\S*STRONG)|\bLDGSTS|\bUTMALDG|\bUBLKCP")
        first = loads.search(text)
        assert first, where
        assert 0 < text.index("ACQBULK") < first.start(), where
        assert "BAR.SYNC" in text[: text.index("PREEXIT")], where


@each_variant("sm90_")
def test_sm90_registers_as_the_warpgroups_take_them(variant: dict[str, Any]) -> None:
    """With setmaxnreg, the SM's registers suffice for all warpgroups whatever the order."""
    texts = code(variant["name"])
    for function in functions(variant["name"]):
        change = r"USETMAXREG\.(DEALLOC|TRY_ALLOC)\.CTAPOOL (?:UP\d, )?(0x\w+)"
        changes = {
            (how, int(n, 16)) for how, n in re.findall(change, texts["sm_90a", function.name])
        }
        if variant["pipeline"] in ("sm90_2wg", "sm90_swap"):
            assert not changes, function
            continue
        (_, given), (_, taken) = sorted(changes)
        assert given <= function.registers <= taken <= 240, function
        consumers = variant["warps"] // 4 - 1
        assert 128 * (given + consumers * taken) <= REGISTERS_PER_SM, function


@each_variant("sm90_3wg", "sm90_swap")
def test_sm90_producer_comes_to_the_first_barrier_together(variant: dict[str, Any]) -> None:
    """No branch of its lanes lies between the tensor maps' prefetch, its first step, and there."""
    for (arch, name), text in code(variant["name"]).items():
        begin = text.split("UTMACCTL.PF")[-1].partition("BAR.SYNC")
        assert begin[1], (arch, name)
        assert "BSSY" not in begin[0], (arch, name)


@each_variant("sm90_")
def test_sm90_boxes_are_loaded_with_a_policy_of_l2_and_without(variant: dict[str, Any]) -> None:
    """Each is there twice where a producer may read KV once: none has a policy of no effect."""
    for (arch, name), text in code(variant["name"]).items():
        boxes = re.findall(r"UTMALDG\.3D [^;]*", text)
        with_policy = re.findall(r"UTMALDG\.3D [^;]*desc\[", text)
        asked = 0 if variant["pipeline"] == "sm90_2wg" else len(boxes) // 2
        assert len(with_policy) == asked, (arch, name)
        assert len(boxes) >= 2, (arch, name)


@each_variant("sm90_3wg", "sm90_swap")
def test_sm90_code_of_few_tokens_is_near_the_entry(variant: dict[str, Any]) -> None:
    """Q's copies and the first box: what is behind some 60 KB comes from memory when it is asked
    for (kernels/sm90/sm90_3wg.md, "Code that is cold")."""
    for (arch, name), text in code(variant["name"]).items():
        for instruction in ("LDGSTS", "UTMALDG"):
            first = re.search(rf"/\*([0-9a-f]+)\*/[^;\n]*{instruction}", text)
            assert first is not None, (arch, name)
            assert int(first[1], 16) < 66 << 10, (arch, name, instruction)


@each_variant("sm90_")
def test_sm90_has_all_its_shared_memory_in_the_dynamic_part(variant: dict[str, Any]) -> None:
    """Which then begins at an address that the swizzle needs; the first KB is the system's."""
    found = re.findall(r"SHARED:(\d+)", cuobjdump(variant["name"], "-res-usage"))
    assert len(found) == len(variant["dtypes"])
    assert set(found) == {"1024"}
