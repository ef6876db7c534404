"""FlashInfer's MLA decode: `from mla.compat import flashinfer` in place of `import flashinfer`.

`BatchMLAPagedAttentionWrapper` as SGLang and vLLM use it, with flat CSR tensors, and in the newer
form with metadata: its names, defaults and conventions. lse is [tokens, num_heads], base 2 unless
base e is asked for, and -inf for rows that see no token. What it has beside dense decode raises
`mla.UnsupportedError`. Every page size, head count and GPU that `mla.decode` runs will do.
"""

from . import mla
from .mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

__all__ = ["BatchMLAPagedAttentionWrapper", "MLAPlanMetadata", "mla"]
