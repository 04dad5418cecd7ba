from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.rewards import Reward
from turnwise.rl.advantage import assign_credit
from turnwise.rl.credit_log import EpisodeCredit, read_credit, write_credit

Dialogue = Callable[..., Episode]


@pytest.fixture
def written(dialogue: Dialogue, tmp_path: Path) -> Path:
    """Two dialogues on a problem, in which the long seat alone was trained."""
    group = [
        dialogue(("long", "think", (4, 5)), ("short", "answer", (6,)), ("long", "think", (7,)), sample=0),
        dialogue(("long", "think", (4,)), ("short", "answer", (6,)), sample=1, right=False),
    ]
    paid = [
        [
            {"long": Reward({"right": 1.0, "brief": 0.5}), "short": Reward({"right": 1.0})},
            {"long": Reward({"right": 0.0, "brief": 0.5}), "short": Reward({"right": 0.0})},
        ]
    ]
    path = tmp_path / "step" / "credit.jsonl"
    write_credit(path, [group], paid, [assign_credit([group], paid, ("long",))])
    return path


def test_each_episode_has_a_line_with_its_terms_and_the_advantages_of_its_turns(written: Path) -> None:
    first, second = map(orjson.loads, written.read_bytes().splitlines())
    assert first == {
        "id": "p#0",
        "rewards": {
            "long": {"total": 1.5, "terms": {"right": 1.0, "brief": 0.5}},
            "short": {"total": 1.0, "terms": {"right": 1.0}},
        },
        "advantages": [0.5, None, 0.5],
    }
    assert (second["id"], second["advantages"]) == ("p#1", [-0.5, None])


def test_what_was_written_is_read(written: Path) -> None:
    read = read_credit(written)
    assert list(read) == ["p#0", "p#1"]
    long, short = Reward({"right": 0.0, "brief": 0.5}), Reward({"right": 0.0})
    assert read["p#1"] == EpisodeCredit({"long": long, "short": short}, (-0.5, None))


def test_a_step_done_again_writes_over_and_a_full_disk_is_told(written: Path, dialogue: Dialogue) -> None:
    group = [dialogue(("long", "think", (4,)), problem="q")]
    write_credit(written, [group], [[{"long": Reward({"right": 1.0})}]], [])
    assert list(read_credit(written)) == ["q#0"]
    assert read_credit(written)["q#0"].advantages == (None,)
    with pytest.raises(InputError, match="cannot write"):
        write_credit(written / "credit.jsonl", [group], [[{"long": Reward({})}]], [])
