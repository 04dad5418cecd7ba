"""The shapes that the modules of losses state are checked wherever a test runs them."""

import sys

from jaxtyping import install_import_hook

CHECKED = ("turnwise.rl.advantage", "turnwise.rl.batch", "turnwise.rl.loss")

# This file is read before any test module of any worker, and a module is checked only if it is imported after the hook.
assert not sys.modules.keys() & set(CHECKED), "modules whose shapes are to be checked were imported before the hook"
install_import_hook(CHECKED, "beartype.beartype")
