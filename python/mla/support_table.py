"""The README's support table, made of the table of variants.

``python -m mla.support_table`` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .checks import D_V, DTYPES
from .device import KIB
from .variants import Variant, variants

# GPUs that each set of images is meant for: examples, the other columns say what is needed.
_EXAMPLES = {
    "ampere_163k": "A100, A30, H100, H200, B200",
    "ampere_99k": "A10, A40, L4, L40S, RTX 30, 40 and 50 series",
    "hopper": "H100, H200",
    "host": "-",
}


def _each(values: Sequence[object]) -> str:
    """The distinct values in the order in which they come, separated by commas."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _device(family: Sequence[Variant]) -> str:
    """What hardware a family of variants needs, in words."""
    first = family[0]
    if first.on_host:
        return "any CPU"
    later = "" if first.exact_sm else " or later"
    return f"sm_{first.min_sm}{later}, {first.smem_limit // KIB} KB of shared memory per block"


def _row(family: Sequence[Variant]) -> tuple[str, ...]:
    first = family[0]
    if first.on_host:
        dims = _each([f"{d_qk}/{d_v}" for d_qk, d_v in D_V.items()])
        rest = (dims, _each(list(DTYPES.values())), "-", "any")
    else:
        dims = _each([f"{variant.d_qk}/{variant.d_v}" for variant in family])
        dtypes = _each([dtype for variant in family for dtype in variant.dtypes])
        rows = _each(sorted({variant.block_rows for variant in family}))
        multiple = max(variant.page_multiple for variant in family)
        pages = "any" if multiple == 1 else f"multiples of {multiple}"
        rest = (dims, dtypes, rows, pages)
    return (f"`{first.pipeline}`", _device(family), _EXAMPLES[first.targets], *rest)


def support_table() -> str:
    """The Markdown table of what runs where: one row per pipeline and kind of GPU."""
    head = ("pipeline", "needs", "for example", "d_qk/d_v", "dtypes", "rows per tile", "page size")
    families: dict[tuple[str, str], list[Variant]] = {}
    for variant in variants():
        families.setdefault((variant.pipeline, variant.targets), []).append(variant)
    lines = [head, ("---",) * len(head), *(_row(family) for family in families.values())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(support_table())
