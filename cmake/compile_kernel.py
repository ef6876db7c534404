"""Compiles one kernel file to an image (fatbin) that loads through the driver API; called by CMake.

nvcc makes PTX once; its `.version` is lowered; ptxas assembles that text for each machine
architecture; fatbinary packs the cubins, and the PTX itself when its architecture has no suffix.
ptxas may come from an older toolkit than nvcc: the machine code then loads on the older toolkit's
drivers, and an instruction that is newer than `.version` is an error here.

Unless told otherwise, any warning, spill or use of local memory fails the build, and so do two
things that ptxas reports as mere information: a setmaxnreg that it ignored and a wgmma that it
serialised. The report stays beside the image as <name>.log.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

# C7508: setmaxnreg ignored. C7510, C7511, ...: wgmma serialised. C7519: a wait put before wgmma.
REFUSED_INFO = re.compile(r".*\(C75\d\d\).*")
FRAME = re.compile(r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    split = argv.index("--")
    parser = argparse.ArgumentParser(description=__doc__)
    for tool in ("nvcc", "ptxas", "fatbinary"):
        parser.add_argument(f"--{tool}", required=True, type=Path)
    parser.add_argument("--virtual-arch", required=True, help="compute_80, compute_90a, ...")
    parser.add_argument("--machine-archs", required=True, nargs="+", help="sm_80, sm_90a, ...")
    parser.add_argument("--ptx-version", required=True, help="the newest that the PTX may need")
    parser.add_argument("--strict", required=True, choices=("0", "1"))
    parser.add_argument("--compress", required=True, choices=("0", "1"))
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("source", type=Path)
    return parser.parse_args(argv[:split]), argv[split + 1 :]


def run(command: list[str], report: list[str]) -> None:
    """Runs a tool; its output goes to the report, and to the terminal when it failed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    report.append(done.stdout)
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed with status {done.returncode}: {' '.join(command)}")


def lower_version(ptx: str, limit: str) -> str:
    """The PTX with `.version` at most `limit`, without hints that older versions do not know."""
    match = re.search(r"^\.version (\d+)\.(\d+)$", ptx, re.MULTILINE)
    if not match:
        sys.exit("nvcc wrote PTX without a .version")
    if tuple(map(int, match.groups())) <= tuple(map(int, limit.split("."))):
        return ptx
    ptx = ptx[: match.start()] + f".version {limit}" + ptx[match.end() :]
    # PTX 8.3. Says which bytes of a vector load are used; it changes no result.
    return re.sub(r'^\s*\.pragma "used_bytes_mask \w+";\n', "", ptx, flags=re.MULTILINE)


def refusals(report: str) -> list[str]:
    """The lines of a ptxas report that fail the build."""
    lines = REFUSED_INFO.findall(report)
    return lines + [m.group(0) for m in FRAME.finditer(report) if any(map(int, m.groups()))]


def main() -> None:
    args, flags = parse_arguments(sys.argv[1:])
    image, report = args.output, []
    ptx_file = image.with_suffix(".ptx")

    compile_to_ptx = [str(args.nvcc), "--ptx", *flags]
    compile_to_ptx += ["-Werror=all-warnings"] if args.strict == "1" else []
    compile_to_ptx += [f"-gencode=arch={args.virtual_arch},code={args.virtual_arch}"]
    # The dependencies are the image's, not the PTX's.
    compile_to_ptx += ["-MD", "-MF", f"{image}.d", "-MT", str(image)]
    run([*compile_to_ptx, "-o", str(ptx_file), str(args.source)], report)
    ptx_file.write_text(lower_version(ptx_file.read_text(), args.ptx_version))

    contents = []
    for arch in args.machine_archs:
        cubin = image.with_suffix(f".{arch}.cubin")
        assemble = [
            str(args.ptxas),
            f"-arch={arch}",
            "-O3",
            "-v",
            "-warn-spills",
            "-warn-lmem-usage",
        ]
        assemble += ["-Werror"] if args.strict == "1" else []
        run([*assemble, str(ptx_file), "-o", str(cubin)], report)
        contents.append(f"--image3=kind=elf,sm={arch.removeprefix('sm_')},file={cubin}")
    if args.virtual_arch[-1].isdigit():
        contents.append(
            f"--image3=kind=ptx,sm={args.virtual_arch.removeprefix('compute_')},file={ptx_file}"
        )

    image.with_suffix(".log").write_text("".join(report))
    if refused := refusals("".join(report)):
        message = f"{args.source} is refused for {image.stem}:\n" + "\n".join(refused)
        if args.strict == "1":
            sys.exit(message)
        print(message)
    compression = "--compress-mode=size" if args.compress == "1" else "--compress=false"
    run([str(args.fatbinary), f"--create={image}", "-64", *contents, compression], report)


if __name__ == "__main__":
    main()
