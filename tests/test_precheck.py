"""The commands `plan` and `doctor`, as a user types them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from turnwise.agents.tiny import LONG
from turnwise.cli import app
from turnwise.environments.errors import InputError
from turnwise.precheck import graph_of
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.recipe import LongShortRecipe, Recipe, ThinklessRecipe
from turnwise.rl.trained_policy import Policy
from turnwise.train import open_trainer

ROOT = Path(__file__).parents[1]
SMALL = ("--long-tokens", "96", "--short-tokens", "64")


def turnwise(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_plan_in_tables() -> None:
    found = turnwise("plan", "longshort", *SMALL, "--machine.gpus-per-node", 4)
    assert found.exit_code == 0, found.output
    for told in ("4 GPU(s)", "short engine 0", "GB on a GPU", "optimiser", "An estimate: 180 steps", "get_peft_model"):
        assert told in found.stdout


def test_a_plan_for_a_machine_to_read() -> None:
    found = turnwise("plan", "longshort", "--json", *SMALL)
    assert found.stdout == turnwise("plan", "--json", "longshort", *SMALL).stdout
    read = json.loads(found.stdout)
    assert [(one["policy"], one["role"], one["gpu"]) for one in read["plan"]["processes"]] == [
        ("long", "engine", 0), ("long", "rank", 1), ("short", "engine", 2), ("short", "rank", 3),
    ]  # fmt: skip
    assert read["plan"]["gpus"][1]["learning"]["optimiser"] == 12 * read["plan"]["shapes"]["long"]["parameters"]
    assert read["plan"]["dialogues"]["long"]["longest"] == 512 + 3 * 96 + 3 * 64
    assert read["estimate"]["gpus"] == 4


@pytest.mark.parametrize("share", ["gpus-per-rank", "gpus-per-actor"])
def test_nothing_is_estimated_where_a_cpu_works(share: str) -> None:
    found = json.loads(turnwise("plan", "--json", "longshort", *SMALL, f"--openrlhf.{share}", 0).stdout)
    assert found["estimate"] is None
    assert len(found["plan"]["gpus"]) == 2


def test_a_plan_larger_than_the_machine() -> None:
    with pytest.raises(
        InputError, match=r"^a plan must fit the machine; it needs 4 GPU\(s\) and 4 CPU\(s\), and 1 node"
    ):
        CliRunner().invoke(app, ["plan", "longshort", "--machine.gpus-per-node", "2"], catch_exceptions=False)


def test_the_doctor_passes_and_fails() -> None:
    found = turnwise("doctor", "thinkless")
    assert found.exit_code == 0, found.output
    assert "15 of 15 checks kept" in found.stdout
    found = turnwise("doctor", "thinkless", "--think-tokens", 2000, "--json")
    assert found.exit_code == 1
    (fault,) = (check for check in json.loads(found.stdout) if check["fault"])
    assert fault["what"] == "dialogues fit the context"


def test_the_doctor_looks_at_all_problems_that_are_trained_on() -> None:
    assert turnwise("doctor", "longshort").exit_code == 0
    # 954 sampled tokens fit the context with each of the first 64 prompts, of at most 66 tokens, but not with all.
    tight = ("doctor", "--json", "longshort", "--short-tokens", 158)
    assert turnwise(*tight, "--train-problems", 64).exit_code == 0
    (fault,) = (check["fault"] for check in json.loads(turnwise(*tight).stdout) if check["fault"])
    assert "prompts of 72 tokens and 954 sampled ones make 1026" in fault


class Lonely(LongShortRecipe):
    """A seat that nobody fills."""

    def policies(self) -> dict[str, Policy]:
        return {"long": Policy(LONG, ("long",))}


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        (
            Lonely(backend="openrlhf"),
            r"^each seat is filled once \(protocol\): each seat must be filled by one policy or partner; \['short'\]",
        ),
        (
            ThinklessRecipe(backend="openrlhf", think_tokens=2000),
            r"^dialogues fit the context \(solver\): the longest dialogue must fit the context; prompts of",
        ),
    ],
)
def test_training_on_openrlhf_sees_the_doctor_before_anything_starts(recipe: Recipe, fault: str) -> None:
    with pytest.raises(InputError, match=fault), open_trainer(recipe):
        pytest.fail("it was opened")


def test_a_protocol_that_is_no_graph_cannot_be_foreseen() -> None:
    class Bare(LongShortRecipe):
        def protocol(self) -> ReasoningProtocol:  # type: ignore[override]
            return Formless()  # type: ignore[abstract]

    class Formless(ReasoningProtocol):
        pass

    Formless.__abstractmethods__ = frozenset()
    with pytest.raises(InputError, match="only a protocol that is a graph can be foreseen; Formless is none"):
        graph_of(Bare())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "openrlhf").glob("*_tiny.toml")), ids=lambda path: path.stem
)
def test_the_doctor_finds_nothing_in_the_tiny_recipes(path: Path) -> None:
    found = turnwise("doctor", path.stem.split("_")[0], "--config", path)
    assert found.exit_code == 0, found.output
