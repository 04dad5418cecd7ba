"""What importing the package costs, and what must not be in it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "ray", "vllm", "datasets", "matplotlib", "openrlhf", "deepspeed")
PACKAGES = ("agents", "analysis", "environments", "protocols", "rl")
# A folder of one machine's or one person's, in text.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:work|home|root|Users|tmp|mnt)/\w")


def loaded_by(statement: str) -> set[str]:
    """The names of the modules that a fresh interpreter has loaded after the statement."""
    command = [sys.executable, "-W", "error", "-c", f"{statement}\nimport sys\nprint(*sys.modules)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=True)
    return set(done.stdout.split())


def tracked() -> list[Path]:
    """The files of the project, those not yet committed included."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize(
    "modules",
    [
        "turnwise",
        "turnwise.protocols.long_short, turnwise.rl.rollout, turnwise.agents.scripted, turnwise.rl.summary, "
        "turnwise.environments.arithmetic, turnwise.environments.math_grader, turnwise.show, turnwise.command, "
        "turnwise.cli, turnwise.agents.team, turnwise.rl.openrlhf.settings",
    ],
)
def test_importing_loads_nothing_heavy(modules: str) -> None:
    loaded = loaded_by(f"import {modules}")
    assert "turnwise" in loaded
    assert not loaded & set(HEAVY)


def test_the_check_of_heavy_imports_sees_one() -> None:
    assert "matplotlib" in loaded_by("import turnwise.protocols.drawing")


def test_every_package_lies_at_the_root_and_is_linked_relatively() -> None:
    for package in PACKAGES:
        link = ROOT / "src" / "turnwise" / package
        assert link.is_symlink()
        assert link.readlink() == Path("..", "..", package)
        assert (ROOT / package / "__init__.py").is_file()


def test_no_package_initialisation_imports_anything() -> None:
    for package in PACKAGES:
        assert "import" not in (ROOT / package / "__init__.py").read_text()


def test_no_path_of_a_machine_is_in_the_project() -> None:
    assert MACHINE_PATH.search('open("/' + 'home/me/x")')
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert not found


def test_no_file_imports_a_package_by_its_bare_name() -> None:
    bare = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(PACKAGES)})(?:\.| |$)", re.MULTILINE)
    assert bare.search("from agents.chat import x")
    texts = {path: path.read_text(encoding="utf-8") for path in tracked() if path.suffix == ".py"}
    assert len(texts) > 30
    assert not [str(path) for path, text in texts.items() if bare.search(text)]
