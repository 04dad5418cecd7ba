"""The commands that take a stored run: contribution, control, export, import-chats."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG
from turnwise.cli import app
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.named import models_of
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import play


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A team of two that always says 1, in 5 and 3 tokens, and a lone agent that does."""
    folder = tmp_path_factory.mktemp("runs")
    team = {
        "long": ScriptedAgent(lambda turn, seed: "<think> It is 1. </think>"),
        "short": ScriptedAgent(lambda turn, seed: "<answer> \\boxed{1} </answer>"),
    }
    with MathGrader() as grader:
        environment = arithmetic(grader, problem_set="easy", count=20)
        with EpisodeStore(folder / "team", {"seed": 0, "protocol": LongShort().fingerprint}) as store:
            play(LongShort(), team, environment, store=store)
        with EpisodeStore(folder / "alone", {"seed": 0}) as store:
            play(Solo("short"), team, environment, samples=2, store=store)
    return folder


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_contribution_of_a_silent_seat(runs: Path, tmp_path: Path) -> None:
    # Its model has to be there, but is never asked: nobody speaks after the last speaker.
    command = (
        "contribution", runs / "team", "--seat", "short", "--output", tmp_path,
        "--model", f"long={LONG}",
    )  # fmt: skip
    (found,) = json.loads(run(*command, "--json"))
    assert (found["seat"], found["instead"], found["episodes"], found["new_tokens"]) == ("short", "ablated", 20, 0)
    assert found["accuracy"]["without"] == 0.0
    assert found["tokens"] == {"team": 8.0, "without": 5.0, "gain": 3.0, "low": 3.0, "high": 3.0}
    assert len((tmp_path / "short-ablated" / "episodes.jsonl").read_text().splitlines()) == 20
    assert "20 episodes of team" in run(*command)


SCRIPT = """
def think(turn, seed):
    return "<think> It is 1. </think>"


def answer(turn, seed):
    thought = any("It is 1" in message.text for message in turn.messages)
    return f"<answer> #### {1 if thought else 2}\\n</answer>"
"""


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What eval writes of a team whose answers stand behind a marker, with budgets of its own."""
    folder = tmp_path_factory.mktemp("marked")
    (folder / "team.py").write_text(SCRIPT)
    problems = ({"problem": f"{n} mod 3?", "answer": n % 3} for n in range(12))
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, problems)))
    run(
        "eval", folder / "mine.jsonl", "--protocol", "longshort", "--seat", f"long={folder / 'team.py'}:think",
        "--seat", f"short={folder / 'team.py'}:answer", "--answer-marker", "####", "--max-tokens", "64",
        "--output", folder / "both",
    )  # fmt: skip
    return folder


def test_contribution_reads_what_eval_writes(marked: Path, tmp_path: Path) -> None:
    command = ("contribution", marked / "both", "--seat", "long", "--max-tokens", "64", "--output", tmp_path)
    (found,) = json.loads(run(*command, "--json"))
    # A third of the answers is 1, and a third 2: without its marker each new answer would be wrong.
    assert (found["accuracy"]["team"], found["accuracy"]["without"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found["strangers"] == []
    with pytest.raises(InputError, match=r"was played by GraphProtocol \w+, and longshort .* LongShort .*--max-tokens"):
        run("contribution", marked / "both", "--seat", "long", "--output", tmp_path)
    with pytest.raises(InputError, match=r"another run \(seat short: '.*answer' there, '.*think' here\)"):
        run(*command, "--model", f"short={marked / 'team.py'}:think")
    with pytest.raises(InputError, match=r"another run \(temperature: 0\.6 there, 0\.1 here\)"):
        run(*command, "--temperature", "0.1")


def test_export_of_the_one_store_that_a_folder_holds(marked: Path, runs: Path, tmp_path: Path) -> None:
    assert run("export", marked / "both", "--to", "inspect", "-o", tmp_path / "both.json").startswith("12 episodes")
    with pytest.raises(InputError, match=r"holds .*alone, .*team: name the folder of one"):
        run("export", runs, "--to", "inspect", "-o", tmp_path / "both.json")


def test_control(runs: Path, tmp_path: Path) -> None:
    command = ("control", runs / "team", "--alone", runs / "alone")
    found = json.loads(run(*command, "--json"))
    assert (found["problems"], found["team"]["tokens"]) == (20, 8.0)
    assert found["voting"]["2"]["tokens"] == 6.0
    assert set(found["gains"]) == {"cut short", "voting"}
    assert found["same_tokens"]["cut short"] == {"accuracy": found["team"]["accuracy"], "tokens": 3.0}
    assert "alone, voting" in run(*command, "--plot", tmp_path / "new" / "control.png")
    assert (tmp_path / "new" / "control.png").read_bytes().startswith(b"\x89PNG")


def test_export(runs: Path, tmp_path: Path) -> None:
    assert run("export", runs / "team", "--to", "inspect", "-o", tmp_path / "team.json").startswith("20 episodes")
    assert len(json.loads((tmp_path / "team.json").read_text())["samples"]) == 20
    assert run("export", runs / "team", "--to", "parquet", "-o", tmp_path / "team.parquet").startswith("20 episodes")
    with pytest.raises(InputError, match="holds none: name the folder of one"):
        run("export", tmp_path, "--to", "parquet", "-o", tmp_path / "team.parquet")


def test_import_chats(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
    chats.write_text(json.dumps({"said": messages, "gold": "2"}) + "\n")
    columns = ("--messages-column", "said", "--answer-column", "gold")
    command = ("import-chats", chats, "-o", tmp_path / "run", *columns, "--marker", "####")
    assert json.loads(run(*command, "--json")) == {"chats": 1, "graded": 1, "right": 1}
    assert "1 graded, 1 of them right" in run(*command)


def test_models_of_seats() -> None:
    assert models_of(["long", "short"], ["long=a=b"], {"short": "c", "seed": 1}) == {"long": "a=b", "short": "c"}
    assert models_of(["long"], [], {"seat long": "tiny-long", "long": "b"}) == {"long": "tiny-long"}
    with pytest.raises(InputError, match=r"no model for seat\(s\) \['long'\]"):
        models_of(["long"], [], {"long": 5})
    with pytest.raises(InputError, match="SEAT=MODEL"):
        models_of(["long"], ["long"], {})
