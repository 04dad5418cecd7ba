"""The shapes that the modules of losses state are checked in all tests."""

import sys

from jaxtyping import install_import_hook

CHECKED = ("turnwise.rl.advantage", "turnwise.rl.batch", "turnwise.rl.loss")

# Each process of the tests reads this file before any of their modules; what was imported earlier would go unchecked.
assert not sys.modules.keys() & set(CHECKED), "the modules to be checked were imported before their shapes are checked"
# An int is a float, as for mypy.
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
