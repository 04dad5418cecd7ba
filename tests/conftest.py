"""The shapes that the modules of losses state are checked in all tests; scripts are run without a process of theirs."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from jaxtyping import install_import_hook

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the virtual environments of vLLM and of OpenRLHF are without it, and so are their tests
    pass
else:
    # No example takes too long: how long they take is the machine's.
    settings.register_profile("turnwise", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("turnwise")

CHECKED = ("turnwise.rl.advantage", "turnwise.rl.batch", "turnwise.rl.loss")

# Each process of the tests reads this file before any of their modules; what was imported earlier would go unchecked.
assert not sys.modules.keys() & set(CHECKED), "the modules to be checked were imported before their shapes are checked"
# An int is a float, as for mypy.
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture
def run_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., "CompletedProcess[str]"]:
    """Runs a script with its arguments as `python -W error` would, in this process: torch is imported once for all."""

    def run(script: Path, *arguments: str | Path) -> "CompletedProcess[str]":
        command = [str(script), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.syspath_prepend(script.parent)
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return CompletedProcess(command, code, *capsys.readouterr())

    return run
