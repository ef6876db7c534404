"""Why a prefill goes the way it does: both predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from . import fused, prefill_costs
from .checks import D_V, DTYPES, check_size
from .device import Device, by_name, indexed, resolve
from .layer_config import Dims
from .models import MODELS
from .prefill_choice import WORKSPACE_BYTES, by_multiplications
from .prefill_estimate import CUDNN_GPUS, Request, estimate
from .prefill_inputs import check_layer
from .prefill_times import Method, PrefillEstimate


@dataclass(frozen=True)
class PrefillExplanation:
    """What is thought of requests that are alike. `str()` is a report."""

    request: Request
    device: Device
    cudnn: bool  # computes un-absorbed attention there
    estimate: PrefillEstimate | None  # microseconds of one request; None on a CPU

    @property
    def method(self) -> Method:
        """The one that `prefill` uses with a plan, or once it has read the lengths."""
        return self._method(captured=False)

    @property
    def captured_method(self) -> Method:
        """The one of a plan that was made with `captured`."""
        return self._method(captured=True)

    def _method(self, captured: bool) -> Method:
        r = self.request
        if r.dtype not in DTYPES or D_V.get(r.dims.d_qk) != r.dims.kv_lora:
            return "expanded"
        if self.estimate is None:
            return by_multiplications(r.dims, r.new)
        return self.estimate.method(captured)

    @property
    def costs(self) -> str | None:
        """Where the constants of the predictions come from, in a clause; None on a CPU."""
        return prefill_costs.of(self.device).source if self.device.type == "cuda" else None

    def __str__(self) -> str:
        r, d = self.request, self.request.dims
        lines = [
            f"prefill    {r.b} x {r.new} new tokens behind {r.length - r.new}, {d.heads} heads of "
            f"{d.nope} + {d.rope} / {d.v} columns, latents of {d.kv_lora}, {str(r.dtype)[6:]}",
            f"device     {self.device}",
            f"method     {self.method}, in a CUDA graph {self.captured_method}",
        ]
        if self.estimate is None:
            return "\n".join([*lines, "predicted  nothing on a CPU: multiplications decide"])
        by = {"absorbed": "mla.decode", "expanded": fused.CUDNN if self.cudnn else fused.FLASH}
        for name, times in self.estimate._asdict().items():
            time = "no kernel"
            if times is not None:
                time = f"{times.gpu:.1f} us a request, by {by[name]}; {times.host:.1f} of the host"
            lines.append(f"{name:11}{time}")
        planning_us = prefill_costs.of(self.device).costs.planning_us
        lines.append(f"planning   {planning_us:.0f} us more a call that is expanded without a plan")
        return "\n".join([*lines, f"constants  {self.costs}"])


def explain_prefill(
    new: int,
    cached: int = 0,
    *,
    b: int = 1,
    dims: Dims = MODELS["DeepSeek-V3"],
    heads: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 64,
    causal: bool = True,
    workspace_bytes: int = WORKSPACE_BYTES,
    device: Device | torch.device | str | int | None = None,
) -> PrefillExplanation:
    """Which way `prefill` goes, and how long both should take.

    new, cached: tokens of each of b requests; the new ones come behind the cached ones.
    dims: of the layer (mla.models has those of models), with `heads` instead of its own.
    device: as for `explain`: the name of a known GPU will do.

    TypeError and ValueError for sizes that are none.
    """
    new, cached = check_size("new", new, 1), check_size("cached", cached, 0)
    check_layer(dims, dtype)
    chosen = dims.dims if heads is None else replace(dims.dims, heads=check_size("heads", heads, 1))
    request = Request(
        chosen, dtype, check_size("b", b, 1), new, new + cached,
        check_size("page_size", page_size, 1), causal,
        check_size("workspace_bytes", workspace_bytes, 1),
    )  # fmt: skip
    found = resolve(device)
    if found.type != "cuda":
        return PrefillExplanation(request, found, False, None)
    here = _here(device)
    cudnn = (
        found.sm in CUDNN_GPUS
        if here is None
        else fused.cudnn_works(here, dtype, chosen.head_dim, chosen.v)
    )
    return PrefillExplanation(request, found, cudnn, estimate(request, found, cudnn))


def _here(device: Device | torch.device | str | int | None) -> torch.device | None:
    """None for a GPU that is known by name only."""
    if isinstance(device, Device) or (isinstance(device, str) and by_name(device)):
        return None
    return indexed(torch.device("cuda" if device is None else device))
