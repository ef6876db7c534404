"""The names under which `flashinfer.mla` has them."""

from .metadata import MLAPlanMetadata
from .wrapper import BatchMLAPagedAttentionWrapper

__all__ = ["BatchMLAPagedAttentionWrapper", "MLAPlanMetadata"]
