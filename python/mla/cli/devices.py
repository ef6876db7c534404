"""Which device a command runs on, and what to call it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from .usage import UsageError


def pick_device(text: str | None) -> torch.device:
    """The device of `--device`; without one the current GPU, or the CPU where there is no GPU."""
    usable = torch.cuda.is_available()
    if text is None:
        text = "cuda" if usable else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f"--device {text}: expected cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"--device {text}: expected cpu, cuda or cuda:N")
    if not usable:
        raise UsageError(f"--device {text}: torch sees no GPU here")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device {text}: there are {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The GPU's name, or that of the CPU's architecture with the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def kernel_driver() -> str | None:
    """Version line of NVIDIA's kernel driver; None without one."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
