"""The examples, run as their docstrings say: those that train, on very little."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
Run = Callable[..., str]
Results = dict[str, dict[str, dict[str, float]]]


@pytest.fixture
def run(run_script: Callable[..., "CompletedProcess[str]"]) -> Run:
    """Runs an example; what it printed."""

    def run(example: str, *arguments: str) -> str:
        done = run_script(ROOT / "examples" / example, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_scripted_rollouts(run: Run) -> None:
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


# The training examples, with a little of everything

SMALL = (
    "--training.steps", "2", "--training.problems", "3", "--training.samples", "2", "--train-problems", "12",
    "--test-problems", "6",
)  # fmt: skip
FEW_STEPS = ("--sft.steps", "2", "--sft.batch-size", "4")
TRAINING = sorted(path.name for path in (ROOT / "examples").glob("train_*.py"))


def trained(run: Run, example: str, output: Path, *arguments: str) -> tuple[str, Results]:
    """What a training example printed, and the results that it wrote; it has logged each step once."""
    printed = run(example, *SMALL, "--output", str(output), *arguments)
    logged = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert logged == [0, 1, 2]
    results = json.loads((output / "results.json").read_text())
    assert all(found["episodes"] >= 6 for found in results["runs"].values())
    return printed, results


def test_training_examples_are_short_and_each_is_tried_here() -> None:
    assert TRAINING == ["train_alone.py", "train_longshort.py", "train_new_protocol.py", "train_thinkless.py"]
    for name in TRAINING:
        assert len((ROOT / "examples" / name).read_text().splitlines()) <= 100, name


def test_train_alone_and_what_is_done_is_not_done_again(tmp_path: Path, run: Run) -> None:
    printed, results = trained(run, "train_alone.py", tmp_path / "run", "--max-tokens", "40")
    assert re.search(r"^step    2  [\d.]+% right \([\d.]+% to [\d.]+%\) in [\d.]+ tokens$", printed, re.MULTILINE)
    assert "round 1, long:" in printed
    assert list(results["runs"]) == ["trained", "before"]
    again, same = trained(run, "train_alone.py", tmp_path / "run", "--max-tokens", "40")
    assert "step" not in again
    assert again.partition("6 problems of")[2] == printed.partition("6 problems of")[2]
    assert same == results


def test_train_longshort(tmp_path: Path, run: Run) -> None:
    rounds = ("--training.rounds", "long short", "--training.steps", "1", "--long-tokens", "40")
    printed, results = trained(run, "train_longshort.py", tmp_path / "run", *rounds)
    assert list(results["runs"]) == ["trained", "before", "long alone", "short alone"]
    assert results["runs"]["short alone"]["episodes"] == 48
    assert [name for name in results["controls"] if "long alone, cut short" in name]
    played = re.findall(r"^│ (long-r\d⊗short-r\d) │", printed, re.MULTILINE)
    assert played == ["long-r0⊗short-r0", "long-r1⊗short-r0", "long-r1⊗short-r1"]
    pool = json.loads((tmp_path / "run" / "pool.json").read_text())
    assert pool["path"] == [[0, 0], [1, 0], [1, 1]]
    assert [len(row) for row in pool["pool"]] == [2, 2]
    assert (tmp_path / "run" / "pool.png").read_bytes().startswith(b"\x89PNG")


def test_train_thinkless(tmp_path: Path, run: Run) -> None:
    printed, results = trained(run, "train_thinkless.py", tmp_path / "run", "--think-tokens", "40")
    assert list(results["runs"]) == [
        "trained", "before", "always think", "never think", "trained, always", "trained, never",
    ]  # fmt: skip
    shares = {name: found["think_share"] for name, found in results["runs"].items()}
    assert (shares["always think"], shares["never think"]) == (1.0, 0.0)
    assert [name for name in results["controls"] if "always think, cut short" in name]
    assert re.search(r"^step    0  .*, thinks \d+%$", printed, re.MULTILINE)
    assert re.search(r"round 1, solver: .*(<short>|<think>) \d+%", printed)


def test_cold_start_and_what_is_done_is_not_done_again(tmp_path: Path, run: Run) -> None:
    flags = ("--problems", "8", "--test-problems", "6", "--rollouts.samples", "4", *FEW_STEPS)
    printed = run("cold_start.py", *flags, "--output", str(tmp_path / "run"))
    assert "Thoughts of 8 chains" in printed
    assert re.search(r"^rollouts +━+ (\d+)/\1 ", printed, re.MULTILINE)
    assert re.search(r"^long +━+ 2/2 .*\nshort +━+ 2/2 ", printed, re.MULTILINE)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["runs"]) == ["trained", "base, prompt only", "base, thinking alone"]
    made = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert made >= {
        "D_long.parquet", "D_short.parquet", "thoughts.parquet", "dropped.jsonl", "figures/success.png",
        "figures/scores.png", "figures/chain.png", "long/model/model.safetensors", "short/model/model.safetensors",
    }  # fmt: skip
    again = run("cold_start.py", *flags, "--output", str(tmp_path / "run"))
    assert not re.search("^(long|short) ", again, re.MULTILINE)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


def test_warm_up_thinkless(tmp_path: Path, run: Run) -> None:
    printed = run(
        "warm_up_thinkless.py", "--problems", "8", "--test-problems", "6", *FEW_STEPS, "--output", str(tmp_path)
    )
    assert re.search(r"^router +━+ 2/2 ", printed, re.MULTILINE)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["runs"]) == ["its own choice", "always think", "never think"]
    assert len(pq.read_table(tmp_path / "pairs.parquet")) == 16


def test_train_new_protocol(tmp_path: Path, run: Run) -> None:
    printed, results = trained(run, "train_new_protocol.py", tmp_path / "run")
    assert list(results["runs"]) == ["trained", "before", "thinker alone"]
    assert re.search(r"┃ ann ┃ bob ┃ cleo ┃ clerk ┃ (thinker ┃ )?turns ┃", printed)
    assert "round 1, juror+thinker" in printed
    assert {path.name for path in (tmp_path / "run" / "policies").glob("*/*")} == {"r0", "r1"}
