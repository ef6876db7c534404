"""Launches every kernel of sanitizer_controls.cu once, for test_sanitizer.py.

python sanitizer_controls.py CUBIN
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cu")
NAMES = re.findall(r"^CONTROL\((\w+)\)", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)
KERNELS = [f"control_{name}{suffix}" for name in NAMES for suffix in ("", "_raced")]
CTAS, THREADS, SHARED_BYTES, BUFFER_BYTES = 2, 256, 32 << 10, 64 << 10

Pointer = ctypes.c_void_p


def launch_all(cubin: bytes) -> None:
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: object) -> None:
        status = getattr(cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: error {status}")

    device, context, module = ctypes.c_int(), Pointer(), Pointer()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuModuleLoadData", ctypes.byref(module), cubin)
    buffers = Pointer(), Pointer()
    for buffer in buffers:
        call("cuMemAlloc_v2", ctypes.byref(buffer), ctypes.c_size_t(BUFFER_BYTES))
        call("cuMemsetD32_v2", buffer, 7, ctypes.c_size_t(BUFFER_BYTES // 4))
    parameters = (Pointer * 2)(*(ctypes.addressof(buffer) for buffer in buffers))
    for name in KERNELS:
        kernel = Pointer()
        call("cuModuleGetFunction", ctypes.byref(kernel), module, name.encode())
        grid, block = (CTAS, 1, 1), (THREADS, 1, 1)
        call("cuLaunchKernel", kernel, *grid, *block, SHARED_BYTES, None, parameters, None)
        call("cuCtxSynchronize")
    print(f"launched: {len(KERNELS)}")


if __name__ == "__main__":
    launch_all(Path(sys.argv[1]).read_bytes())
