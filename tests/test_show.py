"""Bad input is one line on stderr and exit code 2, and nothing is lost by it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess
from typing import Literal, cast

import pytest
from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise.agents.tiny import LONG
from turnwise.analysis.control import Control
from turnwise.command import read_config
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Step, Transcript
from turnwise.rl.rounds import Round
from turnwise.rl.summary import record, summarise
from turnwise.rl.trainer import Report, Trainer
from turnwise.show import read_problems, show_pool, show_results, stages_shown, train_shown

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "longshort_math.py"
Run = Callable[..., "CompletedProcess[str]"]


def assert_refused(done: "CompletedProcess[str]", *expected: str) -> None:
    # transformers shows its progress on stderr.
    lines = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for words in expected:
        assert words in lines[0]


def test_a_problems_file_that_is_missing_or_malformed(tmp_path: Path, run_script: Run) -> None:
    assert_refused(run_script(EXAMPLE, "--problems", tmp_path / "none.jsonl"), "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?", \n')
    assert_refused(run_script(EXAMPLE, "--problems", broken), "broken.jsonl")
    assert_refused(run_script(EXAMPLE, "--problems", "no-such-set"), "no-such-set")


def test_a_model_folder_without_tokenizer(tmp_path: Path, run_script: Run) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(LONG / name, tmp_path / name)
    assert_refused(run_script(EXAMPLE, "--long", tmp_path), "tokenizer", str(tmp_path))
    assert_refused(run_script(EXAMPLE, "--long", tmp_path / "none"), "none")


def test_a_chat_template_that_forces_a_mode(tmp_path: Path, run_script: Run) -> None:
    folder = shutil.copytree(LONG, tmp_path / "forced")
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}"))
    assert template.read_text() != text
    assert_refused(run_script(EXAMPLE, "--long", folder), "<think>", "chat_template")


def test_a_seat_without_an_agent(tmp_path: Path, run_script: Run) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from rich.console import Console\n"
        "from turnwise.agents.scripted import ScriptedAgent\n"
        "from turnwise.show import open_environment, play_shown\n"
        "from turnwise.command import run\n"
        "from turnwise.environments.math_grader import MathGrader\n"
        "from turnwise.protocols.long_short import LongShort\n"
        "def main() -> None:\n"
        "    environment = open_environment('easy', MathGrader(), number=2, seed=0)\n"
        "    play_shown('x', LongShort(), {'long': ScriptedAgent(['<think>'])}, environment, Console())\n"
        "run(main)\n"
    )
    assert_refused(run_script(script), "no agent for seat(s) ['short']; the team has ['long']")


def test_the_folder_of_another_run_is_left_alone_and_the_same_run_goes_on(tmp_path: Path, run_script: Run) -> None:
    arguments = [EXAMPLE, "--number", "6", "--output", tmp_path / "out"]
    first = run_script(*arguments)
    assert first.returncode == 0, first.stderr
    files = sorted((tmp_path / "out").rglob("episodes.jsonl"))
    before = {file: file.read_bytes() for file in files}
    assert len(files) == 3
    assert all(len(lines.splitlines()) == 6 for lines in before.values())
    assert_refused(run_script(*arguments, "--seed", "1"), "holds another run", "seed: 0 there, 1 here")
    again = run_script(*arguments)
    assert again.returncode == 0, again.stderr
    assert {file: file.read_bytes() for file in files} == before
    tables = [done.stdout.partition("6 problems of")[2] for done in (first, again)]
    assert "short alone" in tables[0]
    assert tables[0] == tables[1]
    run_file = json.loads((files[0].parent / "run.json").read_text())
    assert run_file["seed"] == 0


@pytest.mark.parametrize("flag", ["--number=0", "--long-tokens=3"])
def test_a_number_or_flag_that_makes_no_sense(flag: str, run_script: Run) -> None:
    done = run_script(EXAMPLE, flag)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# Settings


class Loss(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float = 0.001
    kind: Literal["mean", "sum"] = "mean"


class Learning(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = 0.1
    steps: PositiveInt = 100
    loss: Loss = Loss()


class Config(BaseModel):
    """Trains nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "tiny"
    test_problems: PositiveInt = 400
    brevity: tuple[tuple[int, float], ...] = ((0, 0.0),)
    output: Path = Path("runs/nothing")
    learning: Learning = Learning(steps=30, loss=Loss(kind="sum"))


class TestReadConfig:
    def written(self, folder: Path, text: str) -> list[str]:
        (folder / "my.toml").write_text(text)
        return ["--config", str(folder / "my.toml")]

    def test_without_a_word_it_is_the_defaults(self) -> None:
        assert read_config(Config, []) == Config()
        assert type(read_config(Config, [])) is Config

    def test_flags_go_over_the_file_and_the_file_over_the_defaults(self, tmp_path: Path) -> None:
        file = self.written(
            tmp_path,
            'model = "filed"\ntest_problems = 7\nbrevity = [[0, 0.0], [5, 0.25]]\n'
            "[learning]\nrate = 0.5\n[learning.loss]\nalpha = 0.25\n",
        )
        assert read_config(Config, file) == Config(
            model="filed", test_problems=7, brevity=((0, 0.0), (5, 0.25)),
            learning=Learning(rate=0.5, steps=30, loss=Loss(alpha=0.25, kind="sum")),
        )  # fmt: skip
        flags = ["--test-problems", "9", "--learning.steps=2", "--learning.loss.kind", "mean", "--output", "x/y"]
        assert read_config(Config, [*flags, *file]) == Config(
            model="filed", test_problems=9, brevity=((0, 0.0), (5, 0.25)), output=Path("x/y"),
            learning=Learning(rate=0.5, steps=2, loss=Loss(alpha=0.25, kind="mean")),
        )  # fmt: skip

    def test_one_nested_setting_leaves_its_neighbours_as_the_config_has_them(self, tmp_path: Path) -> None:
        expected = Config(learning=Learning(steps=30, loss=Loss(alpha=2.0, kind="sum")))
        assert read_config(Config, ["--learning.loss.alpha", "2"]) == expected
        assert read_config(Config, self.written(tmp_path, "learning.loss.alpha = 2.0\n")) == expected

    def test_lists_are_json(self) -> None:
        assert read_config(Config, ["--brevity", "[[0, 0.5], [9, 1]]"]).brevity == ((0, 0.5), (9, 1.0))

    def test_the_environments_variables_are_not_settings(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("model", "MODEL", "test_problems", "TEST_PROBLEMS"):
            monkeypatch.setenv(name, "3")
        for name in ("learning", "LEARNING"):
            monkeypatch.setenv(name, '{"steps": 3}')
        monkeypatch.chdir(tmp_path)
        Path(".env").write_text("model=3\n")
        assert read_config(Config, []) == Config()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--modle", "x"], r".*unrecognized arguments: --modle x; --help lists all flags"),
            (["--learning.stpes", "3"], r".*unrecognized arguments: --learning\.stpes 3; --help lists all flags"),
            (["--learning.st", "3"], r".*unrecognized arguments: --learning\.st 3; --help lists all flags"),
            (["stray"], r".*unrecognized arguments: stray; --help lists all flags"),
            (["--model"], r".*argument --model: expected one argument; --help lists all flags"),
            (["--config"], r"argument --config: expected one argument; --help lists all flags"),
            (["--learning.steps", "few"], r"learning\.steps: Input should be a valid integer, .*; got 'few'"),
            (["--learning.steps", "0"], r"learning\.steps: Input should be greater than 0; got '0'"),
            (["--learning.loss.kind", "max"], r"learning\.loss\.kind: Input should be 'mean' or 'sum'; got 'max'"),
            (["--brevity", "[[0, 0.0]"], r".*brevity.*"),
            (["--brevity", "[[0, 0.0, 1]]"], r"brevity\.0: .*"),
            (
                ["--learning.rate", "x", "--test-problems", "-1"],
                r"test_problems: Input should be greater than 0; got '-1'; learning\.rate: Input should be a valid "
                r"number, .*; got 'x'",
            ),
        ],
    )
    def test_flags_that_cannot_be_used(self, arguments: list[str], message: str) -> None:
        with pytest.raises(InputError) as error:
            read_config(Config, arguments)
        assert re.fullmatch(message, str(error.value)), str(error.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('modle = "x"', r"modle: Extra inputs are not permitted; got 'x'"),
            ("[learning]\nstpes = 3", r"learning\.stpes: Extra inputs are not permitted; got 3"),
            ('[learning]\nsteps = "few"', r"learning\.steps: Input should be a valid integer, .*; got 'few'"),
            ("[learning.loss]\nalpha = [1]", r"learning\.loss\.alpha: Input should be a valid number; got \[1\]"),
            ("learning = 3", r"learning: Input should be .*; got 3"),
            # What the library that reads flags would take for its own.
            ('_env_file = "x"', r"_env_file: Extra inputs are not permitted; got 'x'"),
            ('cli_args = ["--model", "x"]', r"cli_args: Extra inputs are not permitted; got \['--model', 'x'\]"),
            (
                "model = = 3",
                r"--config must name a TOML file; .*/my\.toml cannot be read: Invalid value \(at line 1, .*",
            ),
        ],
    )
    def test_files_that_cannot_be_used(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(InputError) as error:
            read_config(Config, self.written(tmp_path, text))
        assert re.fullmatch(message, str(error.value)), str(error.value)

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        for path, reason in ((tmp_path / "none.toml", "No such file"), (tmp_path, "Is a directory")):
            with pytest.raises(
                InputError, match=rf"^--config must name a TOML file; {path} cannot be read: .*{reason}"
            ):
                read_config(Config, ["--config", str(path)])
        (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(InputError, match="'utf-8' codec can't decode"):
            read_config(Config, ["--config", str(tmp_path / "bytes.toml")])


def test_a_script_with_a_config_says_in_one_line_what_is_wrong_with_its_flags(tmp_path: Path, run_script: Run) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pydantic import BaseModel, ConfigDict\n"
        "from turnwise.command import run_configured\n"
        "class Config(BaseModel):\n"
        "    'Says how often.'\n"
        "    model_config = ConfigDict(extra='forbid')\n"
        "    often: int = 3\n"
        "run_configured(lambda config: print(config.often), Config)\n"
    )
    (tmp_path / "my.toml").write_text("often = 4")
    assert run_script(script, "--config", tmp_path / "my.toml").stdout == "4\n"
    assert_refused(run_script(script, "--oftne", "5"), "unrecognized arguments: --oftne 5")
    (tmp_path / "my.toml").write_text('often = "x"')
    assert_refused(run_script(script, "--config", tmp_path / "my.toml"), "often: Input should be a valid integer")
    helped = run_script(script, "--help")
    assert helped.returncode == 0
    assert "Says how often." in helped.stdout
    assert "--often int" in helped.stdout


# What is shown


class NoGrader(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        raise AssertionError


def episode(number: int, tokens: int, *, right: bool = True, mode: str | None = None) -> Episode:
    steps = [Step("solver", "route", Reply("", 1, "stop", mode))] if mode else []
    problem = Problem(f"p{number}", "1 + 1?", "2", level=number + 1)
    transcript = Transcript(problem, (*steps, Step("solver", "solve", Reply("2", tokens))))
    return Episode(transcript, 0, 0, Grade(Outcome.RIGHT if right else Outcome.WRONG, "2"))


RUNS = {
    "trained": [episode(0, 10), episode(1, 30)],
    "before": [episode(0, 100), episode(1, 300, right=False)],
}


def printed() -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=120, color_system=None), text


def test_results_are_shown_and_written(tmp_path: Path) -> None:
    console, text = printed()
    environment = Environment("two", [one.transcript.problem for one in RUNS["before"]], NoGrader())
    controls = {"before, cut short": Control(0.25, 20.0)}
    show_results(
        RUNS, environment, console, baseline="before", controls=controls,
        plot=tmp_path / "new" / "plot.png", results=tmp_path / "results.json",
    )  # fmt: skip
    shown = text.getvalue()
    # (200 − 20) / 200 + 3 · (1 − 0.5) / 0.5
    for words in ("2 problems of two", "by level", "For the same tokens, alone", "before, cut short", "+3.90"):
        assert words in shown
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "runs": json.loads(json.dumps({name: record(episodes) for name, episodes in RUNS.items()})),
        "controls": {"before, cut short": {"accuracy": 0.25, "tokens": 20.0}},
    }
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "results.json"]


def test_results_without_controls_files_or_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    console, text = printed()
    runs = {"only": [episode(0, 10)]}
    show_results(runs, Environment("one", [Problem("p0", "?", "!")], NoGrader()), console, baseline="only")
    assert "1 problems of one" in text.getvalue()
    assert "by level" not in text.getvalue()
    assert "alone" not in text.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_a_pool_is_shown_and_written(tmp_path: Path) -> None:
    console, text = printed()
    first, second = (summarise(episodes) for episodes in RUNS.values())
    show_pool([[second, first]], [(0, 0), (0, 1)], ("long", "short"), second, console, folder=tmp_path)
    lines = [line for line in text.getvalue().splitlines() if "⊗" in line]
    assert [re.findall(r"long-r\d⊗short-r\d|[+-]\d\.\d\d", line) for line in lines] == [
        ["long-r0⊗short-r0", "+0.00"],
        ["long-r0⊗short-r1", "+3.90"],
    ]
    assert json.loads((tmp_path / "pool.json").read_text()) == {
        "rows": "long",
        "columns": "short",
        "path": [[0, 0], [0, 1]],
        "pool": [
            [{"accuracy": 0.5, "tokens": 200.0, "turns": 1.0}, {"accuracy": 1.0, "tokens": 20.0, "turns": 1.0}],
        ],
    }
    assert (tmp_path / "pool.png").read_bytes().startswith(b"\x89PNG")


@dataclass
class Trained:
    """A trainer that has nothing to do but to report."""

    reports: Sequence[Report]
    steps: int

    def train(self) -> Iterator[Report]:
        yield from self.reports


def test_training_is_shown_with_its_evaluations_and_the_alarm_of_a_collapse() -> None:
    now, figures = Round(2, ("long", "short"), 9), {"right": 0.5, "tokens": 12.4, "share of modes/<short>": 0.75}
    routed = summarise([episode(0, 9, mode="<think>"), episode(1, 19, mode="<short>", right=False)])
    collapses = [None, "<short>", "<short>", None, "<short>", "<think>"]
    reports = [
        Report(0, 9, None, {}, summarise(RUNS["before"]), None),
        *(Report(step, 9, now, figures, None, collapsed) for step, collapsed in enumerate(collapses, start=3)),
        Report(9, 9, now, figures, routed, "<think>"),
    ]
    console, text = printed()
    train_shown(cast(Trainer, Trained(reports, 9)), console)
    *lines, live = text.getvalue().splitlines()
    assert lines == [
        "step    0  50.0% right (9.5% to 90.5%) in 200.0 tokens",
        "step    4  only <short> is chosen: the other modes are no longer tried",
        "step    7  only <short> is chosen: the other modes are no longer tried",
        "step    8  only <think> is chosen: the other modes are no longer tried",
        "step    9  50.0% right (9.5% to 90.5%) in 15.0 tokens, thinks 50%",
    ]
    assert re.fullmatch(r"━+ 9/9 \S+ round 2, long\+short: 50% right in 12 tokens <short> 75% *", live), live


# What the cold start shows


def test_problems_of_a_file_and_those_that_were_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chains.jsonl"
    rows = [("1 + 1?", "2", "So 2."), ("?", "", "Who knows."), ("2 + 1?", "3", "So 3.")]
    lines = [json.dumps({"problem": asked, "answer": gold, "response": said}) for asked, gold, said in rows]
    path.write_text("\n".join(lines))
    found = read_problems(path, number=3, solution="response")
    assert [(one.id, one.question, one.solution) for one in found] == [
        ("chains-0", "1 + 1?", "So 2."), ("chains-2", "2 + 1?", "So 3."),
    ]  # fmt: skip
    told = " ".join(capsys.readouterr().err.split())
    assert told.endswith("2 problems; 1 dropped, as their gold answer cannot be parsed: chains-1")


def test_a_bar_for_each_stage() -> None:
    console = Console(file=StringIO(), width=100, color_system=None)
    with stages_shown(console) as on_progress:
        for done in range(4):
            on_progress("rollouts", done, 3)
        on_progress("completion", 1, 2)
    printed = cast(StringIO, console.file).getvalue()
    assert re.search(r"^rollouts +━+ 3/3 ", printed, re.MULTILINE)
    assert re.search(r"^completion +\S+.* 1/2 ", printed, re.MULTILINE)


def test_chains_of_ones_own_need_a_model_that_completes_them(tmp_path: Path, run_script: Run) -> None:
    example = EXAMPLE.with_name("cold_start.py")
    assert_refused(run_script(example, "--chains", tmp_path / "chains.jsonl"), "--completer")
    output = ("--output", tmp_path / "run", "--problems", "4", "--test-problems", "4", "--sft.steps", "1")
    assert run_script(example, *output, "--sft.batch-size", "2").returncode == 0
    assert_refused(run_script(example, *output, "--sft.batch-size", "3"), "holds another run", "settings")
