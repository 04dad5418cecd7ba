"""The examples that need no model, run as their docstrings say."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(example: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / example), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scripted_rollouts() -> None:
    printed = run("scripted_rollouts.py", "--number", "60", "--seed", "0")
    assert printed == run("scripted_rollouts.py", "--number", "60", "--seed", "0")
    assert "180 scripted episodes" in printed
    rights = re.findall(r"skill (\d+)% │ +([\d.]+)% │ .* │ +([\d.]+) │ +[\d.]+ │ +[\d.]+ │ +([\d.]+) │", printed)
    assert [(skill, tokens, turns) for skill, _, tokens, turns in rights] == [
        ("99", "34.0", "7.0"),
        ("90", "34.0", "7.0"),
        ("70", "34.0", "7.0"),
    ]
    best, middle, worst = (float(right) for _, right, _, _ in rights)
    assert best > middle > worst
    # Each step costs a thought of 6 words and a request of 4; the last request is an answer of 3.
    levels = re.findall(r"│ +(\d) │ +\d+% in (\d+) │ +\d+% in (\d+) │ +\d+% in (\d+) │", printed)
    assert levels == [(str(level), *[str(10 * level - 1)] * 3) for level in range(1, 7)]
