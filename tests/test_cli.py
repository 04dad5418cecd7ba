"""Bad input is one line on stderr and exit code 2, and nothing is lost by it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from turnwise.agents.tiny import LONG

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "longshort_math.py"


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def assert_refused(done: "subprocess.CompletedProcess[str]", *expected: str) -> None:
    # transformers shows its progress on stderr.
    lines = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for words in expected:
        assert words in lines[0]


def test_a_problems_file_that_is_missing_or_malformed(tmp_path: Path) -> None:
    assert_refused(run(EXAMPLE, "--problems", tmp_path / "none.jsonl"), "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?", \n')
    assert_refused(run(EXAMPLE, "--problems", broken), "broken.jsonl")
    assert_refused(run(EXAMPLE, "--problems", "no-such-set"), "no-such-set")


def test_a_model_folder_without_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(LONG / name, tmp_path / name)
    assert_refused(run(EXAMPLE, "--long", tmp_path), "tokenizer", str(tmp_path))
    assert_refused(run(EXAMPLE, "--long", tmp_path / "none"), "none")


def test_a_chat_template_that_forces_a_mode(tmp_path: Path) -> None:
    folder = shutil.copytree(LONG, tmp_path / "forced")
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}"))
    assert template.read_text() != text
    assert_refused(run(EXAMPLE, "--long", folder), "<think>", "chat_template")


def test_a_seat_without_an_agent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from rich.console import Console\n"
        "from turnwise.agents.scripted import ScriptedAgent\n"
        "from turnwise.cli import open_environment, play_shown, run\n"
        "from turnwise.environments.math_grader import MathGrader\n"
        "from turnwise.protocols.long_short import LongShort\n"
        "def main() -> None:\n"
        "    environment = open_environment('easy', MathGrader(), number=2, seed=0)\n"
        "    play_shown('x', LongShort(), {'long': ScriptedAgent(['<think>'])}, environment, Console())\n"
        "run(main)\n"
    )
    assert_refused(run(script), "no agent for seat(s) ['short']; the team has ['long']")


def test_an_output_folder_that_holds_another_run_is_left_alone_and_the_same_run_goes_on(tmp_path: Path) -> None:
    arguments = [EXAMPLE, "--number", "6", "--output", tmp_path / "out"]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    files = sorted((tmp_path / "out").rglob("episodes.jsonl"))
    before = {file: file.read_bytes() for file in files}
    assert len(files) == 3
    assert all(len(lines.splitlines()) == 6 for lines in before.values())
    assert_refused(run(*arguments, "--seed", "1"), "holds another run", "seed: 0 there, 1 here")
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert {file: file.read_bytes() for file in files} == before
    tables = [done.stdout.partition("6 problems of")[2] for done in (first, again)]
    assert "short alone" in tables[0]
    assert tables[0] == tables[1]
    run_file = json.loads((files[0].parent / "run.json").read_text())
    assert run_file["seed"] == 0


@pytest.mark.parametrize("flag", ["--number=0", "--long-tokens=3"])
def test_a_number_or_flag_that_makes_no_sense(flag: str) -> None:
    done = run(EXAMPLE, flag)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
