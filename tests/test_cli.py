"""The command line, by its own runner, and as a new user meets it, in processes of their own."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from turnwise.cli import app
from turnwise.command import EXTRAS, run_app
from turnwise.commands.playing import BENCHMARKS, PROBLEM_SETS, PROTOCOLS
from turnwise.environments import arithmetic, benchmarks
from turnwise.environments.errors import InputError
from turnwise.named import PROTOCOLS as NAMED

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner(env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"}).invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done


def refused(*arguments: str | Path) -> str:
    """The one line of an error that a user must mend; `turnwise` makes exit code 2 of it."""
    done = invoke(*arguments, code=1)
    assert isinstance(done.exception, InputError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def turnwise(*arguments: str | Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "turnwise", *map(str, arguments)],
        capture_output=True, text=True, timeout=600, env=environment, cwd=folder, check=False,
    )  # fmt: skip


def figures(output: str) -> Mapping[str, dict[str, object]]:
    runs: dict[str, dict[str, object]] = json.loads(output)["runs"]
    return runs


# What a new user writes, and nothing else

PROTOCOL = r'''
"""A guesser answers at once; a checker agrees, or asks for another guess, twice at the most."""

from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.rewards import Correctness, RewardSum

second_look = GraphProtocol(
    TurnGraph(
        seats={"guesser": "Answer in \\boxed{}.", "checker": "Write <agreed> or <again>."},
        start="guess",
        states={
            "guess": State(seat="guesser", then="check", max_tokens=64),
            "check": State(seat="checker", closes={"<agreed>": END, "<again>": "guess"}, max_tokens=64),
        },
        max_turns=4,
        dialogue="chat",
    ),
    RewardSum((Correctness(),)),
)


def guess(turn, seed):
    return f"It is \\boxed{{{seed % 3}}}."


def check(turn, seed):
    guessed = turn.messages[-1].text.partition("boxed")[2][1]
    return f"\\boxed{{{guessed}}} <agreed>" if guessed != "0" else "<again>"
'''
PROBLEMS = [{"problem": f"What is {number} modulo 3?", "answer": str(number % 3)} for number in range(30)]
SEATS = ("--seat", "guesser=my_protocol.py:guess", "--seat", "checker=my_protocol.py:check")


def test_a_new_users_path(tmp_path: Path) -> None:
    (tmp_path / "my_protocol.py").write_text(PROTOCOL)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)))
    (declared,) = re.findall(r"^second_look = .*?^\)", PROTOCOL, re.MULTILINE | re.DOTALL)
    assert len(declared.splitlines()) <= 15

    checked = turnwise("protocol", "check", "my_protocol.py", folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "at worst 4 turns and 256 sampled tokens" in checked.stdout
    assert checked.stdout.endswith("faults: 0\n")

    played = turnwise("play", "my_protocol.py", *SEATS, "--problems", "mine.jsonl", folder=tmp_path)
    assert played.returncode == 0, played.stderr
    assert re.search(r"What is 0 modulo 3\?\nguesser: It is \\boxed\{\d\}\.\nchecker: ", played.stdout)
    assert len(re.findall(r"^(?:right|wrong|unparsable), the answer is \d \(\d+ tokens\)$", played.stdout, re.M)) == 3

    evaluated = (
        "eval",
        "mine.jsonl",
        "--protocol",
        "my_protocol.py",
        *SEATS,
        "--samples",
        "4",
        "--output",
        "runs/mine",
    )
    first = turnwise(*evaluated, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "30 problems of mine" in first.stdout
    assert "pass@4" in first.stdout
    lines = (tmp_path / "runs/mine/seed-0/episodes.jsonl").read_text().splitlines()
    assert len(lines) == 120
    again = turnwise(*evaluated, "--json", folder=tmp_path)
    assert (tmp_path / "runs/mine/seed-0/episodes.jsonl").read_text().splitlines() == lines
    assert again.stdout == (tmp_path / "runs/mine/evaluation.json").read_text()
    (run,) = figures(again.stdout).values()
    assert run["episodes"] == 120


# eval


TEAM = """
def think(turn, seed):
    return "<think>" + "so " * (seed % 20 + 5) + "</think>"


def answer(turn, seed):
    return f"<answer> \\\\boxed{{{seed % 2}}} </answer>" if seed % 3 else "<answer> Go on. </rethink>"


def alone(turn, seed):
    return "well " * (seed % 50 + 50) + f"\\\\boxed{{{seed % 4}}}"
"""


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with agents that guess, one of them alone and at length."""
    path = tmp_path_factory.mktemp("team") / "team.py"
    path.write_text(TEAM)
    return path


@pytest.fixture(scope="module")
def alone(team: Path) -> Path:
    """A run of the lone agent."""
    invoke("eval", "hard", "--seat", f"{team}:alone", "--number", "20", "--output", team.parent / "alone")
    return team.parent / "alone"


def seats(team: Path) -> tuple[str, ...]:
    return "--seat", f"long={team}:think", "--seat", f"short={team}:answer"


def test_eval_beside_a_baseline(team: Path, alone: Path, tmp_path: Path) -> None:
    flags = ("eval", "hard", "--protocol", "longshort", *seats(team), "--number", "20", "--seed", "0", "--seed", "7")
    shown = invoke(*flags, "--baseline", alone, "--output", tmp_path / "both").stdout
    for words in ("20 problems of arithmetic-hard", "pass@2", "by level", f"Against {alone}", "tokens: sampled tokens"):
        assert words in shown
    result = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    both, base = result["runs"]["longshort"], result["runs"][str(alone)]
    assert (both["seeds"], both["samples"], both["problems"], base["samples"]) == ([0, 7], 2, 20, 1)
    assert set(both["seat_tokens"]) == {"long", "short"}
    assert both["tokens"]["low"] < both["tokens"]["value"] < both["tokens"]["high"] < base["tokens"]["low"]
    against = result["differences"]["longshort"]
    assert (against["baseline"], against["problems"]) == (str(alone), 20)
    assert against["tokens"]["value"] == pytest.approx(both["tokens"]["value"] - base["tokens"]["value"])
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"seed-0", "seed-7", "evaluation.json"}

    replayed = invoke("eval", "hard", "--protocol", "longshort", "--replay", tmp_path / "both", "--json")
    assert figures(replayed.stdout)["both"] == both
    one = invoke("eval", "hard", "--protocol", "longshort", "--replay", tmp_path / "both" / "seed-7", "--json")
    assert figures(one.stdout)["seed-7"]["seeds"] == [7]
    assert "replay the same protocol" in refused("eval", "hard", "--replay", tmp_path / "both", "--protocol", "solo")


def test_a_replay_is_of_what_is_stored_and_no_other(team: Path, tmp_path: Path) -> None:
    for name in ("think", "alone"):
        flags = ("eval", "hard", "--seat", f"{team}:{name}", "--number", "20", "--samples", "2")
        invoke(*flags, "--output", tmp_path / name)
    path = tmp_path / "alone" / "seed-0" / "episodes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith('{"id":"' + json.loads(lines[0])["id"])))
    replayed = ("eval", "hard", "--number", "20", "--output", tmp_path / "again", "--replay")
    found = figures(invoke(*replayed, tmp_path / "alone" / "seed-0", "--json").stdout)["seed-0"]
    # Of one sample that failed, the other is there.
    assert (found["episodes"], found["samples"], found["problems"]) == (39, 1, 20)
    assert "holds another run" in refused(*replayed, tmp_path / "think" / "seed-0")


def test_an_eval_that_was_another_run(team: Path, alone: Path) -> None:
    flags = ("eval", "hard", "--number", "20", "--output", alone)
    assert "holds another run" in refused(*flags, "--seat", f"{team}:answer")
    marked = ("--seat", f"{team}:alone", "--answer-marker", "####")
    assert "answer_marker: '' there, '####' here" in refused(*flags, *marked)
    assert "a baseline is one of solo, or the folder" in refused(*flags, *marked[:2], "--baseline", "nothing")


def test_solutions(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS[:4])))
    rows = [
        {"question": row["problem"], "model": model, "solution": f"so #### {said}"}
        for row in PROBLEMS[:4]
        for model, said in (("good", row["answer"]), ("good", row["answer"]), ("one", "1"), ("one", "two things"))
    ]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("eval", tmp_path / "mine.jsonl", "--solutions", tmp_path / "said.jsonl", "--answer-marker", "####")
    shown = invoke(*flags, "--baseline", "good").stdout
    assert "tokens: words of the stored texts" in shown
    assert "Against good" in shown
    runs = figures(invoke(*flags, "--json").stdout)
    assert {name: (run["samples"], run["episodes"]) for name, run in runs.items()} == {"good": (2, 8), "one": (2, 8)}
    assert runs["good"]["outcomes"] == {"right": 8}
    assert runs["one"]["outcomes"] == {"right": 1, "wrong": 7}
    # "so #### 1" is three words, and "so #### two things" four
    assert runs["one"]["tokens"] == {"value": 3.5, "low": 3.5, "high": 3.5}
    assert "good has no stored solution" in refused(*flags, "--samples", "3")
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row["model"] == "one"))
    words = ("eval", tmp_path / "mine.jsonl", "--solutions", tmp_path / "one.jsonl", "--answer-marker", "####")
    invoke(*words, "--output", tmp_path / "words")
    assert "Against" in invoke(*words, "--baseline", tmp_path / "words").stdout
    message = "are words of the stored texts, and this run's are of tiny-long in the stored texts"
    assert message in refused(*words, "--baseline", tmp_path / "words", "--tokenizer", "tiny-long")
    again = ("eval", tmp_path / "mine.jsonl", "--replay", tmp_path / "words", "--answer-marker", "####")
    assert "tokens: words of the stored texts" in invoke(*again, "--baseline", tmp_path / "words").stdout


def test_tokens_of_solutions(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps(PROBLEMS[0]))
    (tmp_path / "said.jsonl").write_text(json.dumps({"id": "mine-0", "solution": "12×34=408"}))
    flags = ("eval", tmp_path / "mine.jsonl", "--solutions", tmp_path / "said.jsonl", "--tokenizer", "tiny-long")
    counted = figures(invoke(*flags, "--json").stdout)["said"]
    assert (counted["samples"], counted["outcomes"]) == (1, {"unparsable": 1})
    assert counted["tokens"] == {"value": 9.0, "low": 9.0, "high": 9.0}  # one for each character
    assert "cannot load a tokenizer from" in refused(*flags[:-1], tmp_path)


def test_gsm8k_with_the_solutions_of_real_models(tmp_path: Path) -> None:
    for name in ("gsm8k_test.jsonl", "gsm8k_model_solutions.jsonl"):
        if not (DATA / name).exists():
            pytest.skip(f"../shared/data/{name} is not there")
    labelled = [json.loads(line) for line in (DATA / "gsm8k_model_solutions.jsonl").read_text().splitlines()]
    done = invoke(
        "eval", f"gsm8k={DATA / 'gsm8k_test.jsonl'}", "--solutions", DATA / "gsm8k_model_solutions.jsonl",
        "--answer-marker", "A:", "--baseline", "175b_finetuning", "--output", tmp_path / "run",
    )  # fmt: skip
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (result["benchmark"], result["problems"]) == ("gsm8k", 1319)
    for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        run, right = result["runs"][model], sum(item[model]["is_correct"] for item in labelled)
        assert run["outcomes"]["right"] == right
        assert run["accuracy"]["value"] == pytest.approx(right / 1319)
        # As wide as the normal approximation has it, ±1.96 √(p (1 − p) / n).
        half, share = (run["accuracy"]["high"] - run["accuracy"]["low"]) / 2, right / 1319
        assert half == pytest.approx(1.96 * (share * (1 - share) / 1319) ** 0.5, rel=0.12)
        words = sum(len(item[model]["solution"].split()) for item in labelled) / 1319
        assert run["tokens"]["value"] == pytest.approx(words)
    assert [row["system"] for row in result["printed"]][-1] == "Thinkless"
    assert re.search(r"│ Thinkless │ Thinkless +│ 84\.2% │ +624 │ +13% │", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hard"], "who answers must be said in one way"),
        (["hard", "--seat", "x", "--replay", "y"], "who answers must be said in one way"),
        (["hard", "--solutions", "x", "--seed", "1"], "--seed goes with --seat"),
        (["hard", "--seat", "tiny-long", "--tokenizer", "x"], "--tokenizer with --solutions"),
        (["hard", "--seat", "x", "--protocol", "nothing"], "no protocol is called 'nothing'"),
        (["hard", "--seat", "long=x", "--protocol", "longshort"], "nobody fills short"),
        (["nothing", "--seat", "tiny-long"], "no problems are called 'nothing'"),
        (["hard", "--seat", "tiny-long", "--number", "0"], "must be at least 1"),
        (["hard", "--replay", "no-such-folder"], "holds no finished episodes"),
        (["hard", "--solutions", "none.jsonl"], "cannot read solutions"),
        (["hard", "--solutions", "none.jsonl", "--protocol", "debate"], "stored solutions fill one seat"),
    ],
)
def test_what_eval_refuses(arguments: list[str], message: str) -> None:
    assert message in refused("eval", *arguments)


# play, protocol, audit


def test_play_shows_turns_as_they_come_and_keeps_them(team: Path, tmp_path: Path) -> None:
    flags = ("play", "longshort", *seats(team), "--number", "2", "--output", tmp_path / "run")
    shown = invoke(*flags).stdout
    assert len(re.findall(r"^long: <think>", shown, re.MULTILINE)) >= 2
    assert len(re.findall(r"^short: <answer>", shown, re.MULTILINE)) >= 2
    assert len(re.findall(r"the answer is \d \(\d+ tokens\)$", shown, re.MULTILINE)) == 2
    assert invoke(*flags).stdout == ""
    lines = invoke("play", "longshort", *seats(team), "--number", "2", "--json").stdout.splitlines()
    assert lines == (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()


def test_a_failed_episode_is_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def broken(turn, seed):\n    raise RuntimeError('lost')\n")
    assert "failed: RuntimeError: lost" in invoke("play", "solo", "--seat", f"{path}:broken", code=1).stdout


def test_protocol_check() -> None:
    shown = invoke("protocol", "check", "longshort").stdout
    assert "at worst 6 turns and 4,608 sampled tokens" in shown
    assert "</rethink> → think" in shown
    found = json.loads(invoke("protocol", "check", "thinkless", "--json").stdout)
    assert (found["most_turns"], found["most_tokens"], found["faults"]) == (2, 24577, [])
    assert found["states"]["route"]["closes"] == {"<short>": "short", "<think>": "think"}


def test_protocol_check_of_a_faulty_one_is_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PROTOCOL.replace('"<again>": "guess"', '"<again>": "gess"'))
    shown = invoke("protocol", "check", path, code=1).stdout
    assert "state 'check' leads to 'gess' on '<again>', which is no state; the states are guess, check" in shown
    assert "faults: 1" in shown
    assert len(json.loads(invoke("protocol", "check", path, "--json", code=1).stdout)["faults"]) == 1
    assert "leads to 'gess'" in refused("play", path, "--seat", "tiny-long")
    path.write_text(
        "from turnwise.protocols.rewards import Format, RewardSum\nfrom turnwise.protocols.solo import Solo\n"
        "solo = Solo(reward=RewardSum((Format({'other': ((), ())}),)))\n"
    )
    # The module of a path is run once in a process.
    other = path.rename(tmp_path / "other.py")
    assert "no tags for seat 'solver'" in invoke("protocol", "check", other, code=1).stdout


def test_protocol_draw(tmp_path: Path) -> None:
    invoke("protocol", "draw", "longshort", "-o", tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    assert "a figure is written as PNG; got x.foo" in refused("protocol", "draw", "solo", "-o", "x.foo")
    under_a_file = tmp_path / "graph.png" / "x.png"
    assert f"cannot write {under_a_file}: " in refused("protocol", "draw", "solo", "-o", under_a_file)
    assert invoke("protocol", "draw", "solo").stdout.startswith("flowchart LR\n    start(( )) --> s0\n")


def test_audit_of_what_a_model_played(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    invoke("eval", "easy", "--seat", "tiny-short", "--number", "2", "--output", alone)
    assert "faults: 0" in invoke("audit", alone).stdout
    store = tmp_path / "run" / "episodes.jsonl"
    store.parent.mkdir()
    row = json.loads((alone / "seed-0" / "episodes.jsonl").read_text().splitlines()[0])
    row["steps"][0]["token_count"] += 1
    store.write_text(json.dumps(row) + "\n")
    found = json.loads(invoke("audit", store.parent, "--json", code=1).stdout)
    assert found["episodes"] == 1
    assert "lengths: token_count" in found["faults"][0]
    assert "holds no episodes" in refused("audit", tmp_path / "nothing")


# The whole


def test_the_names_in_help_are_those_there_are() -> None:
    assert tuple(arithmetic.PROBLEM_SETS) == PROBLEM_SETS
    assert tuple(benchmarks.BENCHMARKS) == BENCHMARKS
    assert tuple(NAMED) == PROTOCOLS


@pytest.mark.parametrize("command", ["play", "eval", "audit", "protocol draw", "protocol check"])
def test_help_teaches_by_example(command: str) -> None:
    helped = " ".join(invoke(*command.split(), "--help").stdout.replace("│", " ").split())
    assert f"turnwise {command} " in helped.partition("Options")[0].partition("Usage")[2].partition("]")[2]
    assert invoke("--help").stdout.count(command.split()[0]) >= 1


def test_names_are_completed() -> None:
    def completed(line: str) -> set[str]:
        variables = {
            "_TURNWISE_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        done = CliRunner(env=variables).invoke(app, prog_name="turnwise")
        return set(done.stdout.split())

    assert completed("turnwise play th") == {"thinkless"}
    assert completed("turnwise eval aime") == {"aime-2024", "aime-2025"}
    assert completed("turnwise eval hard --protocol alw") == {"always-think"}


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = turnwise("play", "longshort", "--seat", "long=x", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: each seat needs one agent")
    assert len(done.stderr.splitlines()) == 1


def stopped(capsys: pytest.CaptureFixture[str], command: Callable[[], object]) -> str:
    """The one line with which a command ends that a user must mend."""
    with pytest.raises(SystemExit, match=r"^2$"):
        run_app(command)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_graph_that_a_command_makes_and_pydantic_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "capped.py"
    recipe.write_text(
        "from turnwise.protocols.long_short import LongShort\nfrom turnwise.rl.recipe import LongShortRecipe\n"
        "class Capped(LongShortRecipe):\n    def protocol(self):\n        return LongShort(max_turns=-1)\n"
    )
    told = stopped(capsys, lambda: app(["doctor", str(recipe)]))
    assert told == "error: TurnGraph: max_turns: Input should be greater than 0; got -1"
    protocol = tmp_path / "limited.py"
    protocol.write_text(PROTOCOL.replace("max_turns=4,", "max_turns=4, token_limit=256,"))
    told = stopped(capsys, lambda: app(["play", str(protocol), "--seat", "tiny-long", "--max-tokens", "500"]))
    assert told.startswith("error: TurnGraph: ")
    assert "256" in told


@pytest.mark.parametrize(("package", "extra"), EXTRAS.items())
def test_a_package_that_is_not_there(
    package: str, extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    told = stopped(capsys, lambda: import_module(package))
    assert told == f"error: this command needs the package {package}: pip install 'turnwise[{extra}]'"
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_a_module_that_nothing_brings_is_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError):
        run_app(lambda: import_module("turnwise.nowhere"))


def test_the_cold_start_tells_its_settings_and_what_it_cannot_do() -> None:
    shown = invoke("cold-start", "--help").stdout
    assert "--rollouts.samples" in shown
    assert "usage: turnwise cold-start" in shown
    told = refused("cold-start", "--chains", "r1.jsonl")
    assert told.startswith("the rule that writes short thoughts knows arithmetic alone; name a model with")
