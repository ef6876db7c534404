"""transformers, where it is here and takes this torch; what imports it is skipped elsewhere."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers", "5.0", reason="needs transformers")
if not transformers.utils.is_torch_available():
    pytest.skip("this transformers does not take this torch", allow_module_level=True)
