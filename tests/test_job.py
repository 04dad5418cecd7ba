"""The commands `plan` and `doctor`, as a user types them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.cli import app
from turnwise.environments.errors import InputError
from turnwise.job import read_job

SMALL = "long_tokens = 96\nshort_tokens = 64\n"


def turnwise(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (file := tmp_path / "run.toml").write_text(SMALL + "[machine]\ngpus_per_node = 4\n")
    return file


def test_a_plan_in_tables(config: Path) -> None:
    found = turnwise("plan", "--policy", f"long={LONG}", "--policy", f"short={SHORT}", "--config", config)
    assert found.exit_code == 0
    for told in ("4 GPU(s)", "short engine 0", "GB on a GPU", "optimiser", "An estimate: 100 steps", "get_peft_model"):
        assert told in found.stdout


def test_a_plan_for_a_machine_to_read(config: Path) -> None:
    found = turnwise("plan", "--policy", f"all={LONG}", "--seats", "all=long,short", "--config", config, "--json")
    read = json.loads(found.stdout)
    assert [(one["policy"], one["role"], one["gpu"]) for one in read["plan"]["processes"]] == [
        ("all", "rank", 0), ("all", "engine", 1),
    ]  # fmt: skip
    assert read["plan"]["gpus"][0]["learning"]["optimiser"] == 12 * read["plan"]["shapes"]["all"]["parameters"]
    assert read["plan"]["dialogues"]["all"]["longest"] == 512 + 3 * 96 + 3 * 64
    assert read["estimate"]["gpus"] == 2


def test_the_doctor_passes_and_fails(config: Path) -> None:
    command = ("doctor", "--policy", f"solver={ROUTER}", "--protocol", "thinkless")
    found = turnwise(*command, "--config", config)
    assert found.exit_code == 0
    assert "15 of 15 checks kept" in found.stdout
    found = turnwise(*command, "--json")
    assert found.exit_code == 1
    (fault,) = (check for check in json.loads(found.stdout) if check["fault"])
    assert fault["what"] == "dialogues fit the context"


@pytest.mark.parametrize(
    ("policies", "seats", "written", "fault"),
    [
        (["long"], [], "", "--policy must be like NAME=...; got ['long']"),
        (["long=x"], ["lang=long"], "", "--seats names policies of ['long']; got ['lang']"),
        (["long=x"], [], "[openrlhf]\nrank = 2", "openrlhf.rank: Extra inputs are not permitted; got 2"),
        (["long=x"], [], "[openrlhf", "--config must name a TOML file"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, policies: list[str], seats: list[str], written: str, fault: str) -> None:
    (file := tmp_path / "run.toml").write_text(written)
    with pytest.raises(InputError) as error:
        read_job(policies, seats, "longshort", file)
    assert fault in str(error.value)
