"""Multi-head latent attention (MLA) decode for NVIDIA GPUs and the CPU."""

from . import checkpoint, models, nn, rope
from .absorb import AbsorbedWeights, absorb
from .api import decode
from .append import append
from .dispatch import use_variant
from .errors import CudaError, UnsupportedError
from .explain import explain
from .info import info, version
from .layer_config import LayerConfig
from .merge import merge_states
from .plan import Plan, plan
from .prefill import Prefill, prefill
from .prefill_explain import explain_prefill
from .prefill_plan import PrefillPlan, plan_prefill
from .preload import preload
from .variants import variants

__version__ = version()

__all__ = [
    "AbsorbedWeights",
    "CudaError",
    "LayerConfig",
    "Plan",
    "Prefill",
    "PrefillPlan",
    "UnsupportedError",
    "__version__",
    "absorb",
    "append",
    "checkpoint",
    "decode",
    "explain",
    "explain_prefill",
    "info",
    "merge_states",
    "models",
    "nn",
    "plan",
    "plan_prefill",
    "prefill",
    "preload",
    "rope",
    "use_variant",
    "variants",
]
