"""Lets OpenRLHF be imported where flash-attn, which must be compiled with CUDA, is not installed.

OpenRLHF imports a few of its functions, for samples packed into one row and for ring attention. turnwise asks for
neither; whoever calls one of these functions nevertheless is told what is missing. Nobody else sees them.
"""

import sys
from importlib import import_module
from types import ModuleType

FUNCTIONS = {
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils.distributed": ("all_gather",),
}


def absent(*_: object) -> None:
    """In the place of each of these functions."""
    raise RuntimeError("flash-attn is not installed; OpenRLHF packs no samples and has no ring attention without it")


_modules = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.utils", *FUNCTIONS)}
for _name, _functions in FUNCTIONS.items():
    vars(_modules[_name]).update(dict.fromkeys(_functions, absent))
sys.modules.update(_modules)
try:
    import_module("openrlhf.models.ring_attn_utils")
finally:
    for _name in _modules:
        del sys.modules[_name]
