"""Lets OpenRLHF's Ray actors be imported where vLLM is not installed, and transformers samples in its place.

The package that they stand in imports its vLLM actor on the way. Here it is a package that imports nothing.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

PACKAGE = "openrlhf.trainer.ray"

_spec = find_spec("openrlhf")
assert _spec is not None
assert _spec.origin is not None
_package = ModuleType(PACKAGE)
_package.__path__ = [str(Path(_spec.origin).parent / "trainer" / "ray")]
sys.modules[PACKAGE] = _package
