"""Recipes by name, the trainers that they open, and the command that runs them."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turnwise.cli import app
from turnwise.environments.errors import InputError
from turnwise.rl.recipe import LongShortRecipe, ThinklessRecipe
from turnwise.rl.trainer import TrainingSettings
from turnwise.train import open_backend, open_trainer, recipe_called

LITTLE = TrainingSettings(steps=1, problems=2, samples=2)
MINE = """
from pathlib import Path
from beside import BUDGET
from turnwise.rl.recipe import LongShortRecipe, Recipe

class Mine(LongShortRecipe):
    long_tokens: int = BUDGET
    output: Path = Path("mine")
"""


def test_recipes_by_name() -> None:
    assert recipe_called("longshort") is LongShortRecipe
    assert recipe_called("thinkless") is ThinklessRecipe


def test_a_recipe_of_a_file_which_may_import_what_stands_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("BUDGET = 77")
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    found = recipe_called(str(file))
    assert issubclass(found, LongShortRecipe)
    assert (found.__name__, found().long_tokens) == ("Mine", 77)
    file = tmp_path / "ours.py"
    file.write_text(f"{MINE}\nclass Other(Mine):\n    short_tokens: int = 5\n")
    assert recipe_called(f"{file}:Other")().short_tokens == 5
    for name, got in ((f"{file}", "Mine, Other"), (f"{file}:Third", "Mine, Other, not Third")):
        with pytest.raises(InputError, match=f"must define one subclass of .* it defines {got}$"):
            recipe_called(name)
    file = tmp_path / "none.py"
    file.write_text("x = 1")
    with pytest.raises(InputError, match=r"it defines none$"):
        recipe_called(str(file))


@pytest.mark.parametrize(
    ("name", "told"),
    [("long", "one of longshort, thinkless, .* got 'long'"), ("none.py", "no file none.py"), (".", "got '.'")],
)
def test_names_of_no_recipe(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        recipe_called(name)


def test_problems_to_train_on_are_not_those_to_evaluate_on(tmp_path: Path) -> None:
    recipe = ThinklessRecipe(
        train="easy", train_problems=30, test_problems=10, training=LITTLE, output=tmp_path / "run"
    )
    with open_trainer(recipe) as trainer:
        train, test = trainer.environment, trainer.evaluation
    assert (len(train.problems), len(test.problems)) == (30, 10)
    assert {problem.level for problem in train.problems} == {1, 2}
    assert {problem.level for problem in test.problems} == {1, 2, 3, 4, 5, 6}
    assert not {problem.id for problem in train.problems} & {problem.id for problem in test.problems}


def test_problems_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n}+1?", "answer": str(n + 1)}) + "\n" for n in range(5)))
    recipe = ThinklessRecipe(train=str(file), train_problems=3, training=LITTLE, output=tmp_path / "run")
    with open_trainer(recipe) as trainer:
        assert [problem.question for problem in trainer.environment.problems] == ["0+1?", "1+1?", "2+1?"]


def test_the_command_trains_shows_and_does_not_train_again(tmp_path: Path) -> None:
    settings = tmp_path / "little.toml"
    settings.write_text(
        "train_problems = 4\ntest_problems = 3\nthink_tokens = 30\n[training]\nsteps = 9\nproblems = 2\nsamples = 2\n"
    )
    flags = [
        "train",
        "thinkless",
        "--config",
        str(settings),
        "--training.steps",
        "1",
        "--output",
        str(tmp_path / "run"),
    ]
    done = CliRunner().invoke(app, flags, catch_exceptions=False)
    assert done.exit_code == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
    ]
    assert re.search(r"before │ +0 │ +[\d.]+% │ .*\n│ best .*\n│ after +│ +1 │", done.output)
    assert "step    1" in done.output
    again = CliRunner().invoke(app, flags, catch_exceptions=False)
    assert "step    1" not in again.output
    assert again.output.partition("┏")[2] == done.output.partition("┏")[2]


def test_help_is_of_the_command_before_a_recipe_and_of_the_recipe_behind_it() -> None:
    assert "FILE.py:NAME" in CliRunner().invoke(app, ["train", "--help"]).output
    done = CliRunner().invoke(app, ["train", "thinkless", "--help"])
    assert done.exit_code == 0
    assert done.output.startswith("usage: turnwise train thinkless ")
    assert "--learner.loss.alpha" in done.output
    assert "--short-learner" not in done.output


def test_bad_input_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    for flags, told in (
        (["nothing"], "got 'nothing'"),
        (["thinkless", "--gamma", "1"], "gamma: .* less than 1; got '1'"),
        (["thinkless", "--train", "nothing"], "no problems are called 'nothing'"),
        (["thinkless", "--train", "nothing", "--backend", "openrlhf"], "no problems are called 'nothing'"),
        (["longshort", "--brevity", "[[3,0.0],[1,0.0]]"], "steps must increase"),
        (["longshort", "--training.rounds", "nobody"], r"\['nobody'\]"),
    ):
        with pytest.raises(InputError, match=told) as raised:
            CliRunner().invoke(app, ["train", *flags, "--output", str(tmp_path / "run")], catch_exceptions=False)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_without_openrlhf_its_backend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with (
        pytest.raises(
            InputError, match=r"needs OpenRLHF, and deepspeed is not installed: .* pip install .* make openrlhf"
        ),
        open_backend(ThinklessRecipe(backend="openrlhf")),
    ):
        raise AssertionError("it was opened")
