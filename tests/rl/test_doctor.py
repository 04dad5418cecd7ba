"""A sound run is passed, and each fault that is planted is found, by name, before a weight is loaded."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import nan
from pathlib import Path

import pytest
from tokenizers import decoders, normalizers
from transformers import PreTrainedTokenizerFast

from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.environments.answers import last_marked
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.environment import Environment
from turnwise.environments.episode import Episode
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.named import open_protocol
from turnwise.protocols.debate import Debate, Panel
from turnwise.protocols.gated import Gated
from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.rewards import Correctness, RewardSum, Term
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.doctor import Check, examine, walk
from turnwise.rl.trained_policy import Policy

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_protocol.py"
Edit = Callable[[PreTrainedTokenizerFast], object]


PROTOCOLS = {
    "long short": LongShort(),
    "long short, even cap": LongShort(max_turns=5),
    "thinkless": Thinkless(),
    "thinkless, short": Thinkless(mode="short"),
    "thinkless, think": Thinkless(mode="think"),
    "gated": Gated(),
    "solo": Solo(),
    "solo, with tags": Solo("long", stops=("</answer>",), prefill="<think>", answer_after="</think>"),
    "debate": Debate(("ann", "bob", "cleo"), rounds=3),
    "panel": Panel(),
    "jury": open_protocol(f"{EXAMPLE}:jury"),
}


@pytest.fixture(scope="module")
def environment() -> Iterator[Environment]:
    with MathGrader(workers=1) as grader:
        yield arithmetic(grader, count=6)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder with a long context, and without the weights."""
    return folder(tmp_path_factory.mktemp("sound"))


def folder(to: Path, edit: Edit | None = None, *, ends: int | None = None, vocabulary: int | None = None) -> Path:
    for file in ROUTER.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, to)
    config = json.loads((to / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    config |= {} if vocabulary is None else {"vocab_size": vocabulary}
    (to / "config.json").write_text(json.dumps(config))
    if edit is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(to)
        edit(tokenizer)
        tokenizer.save_pretrained(to)
    if ends is not None:
        (to / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return to


def policies(protocol: GraphProtocol, model: Path) -> dict[str, Policy]:
    return {seat: Policy(model, (seat,)) for seat in protocol.seats}


def faults(checks: Sequence[Check]) -> dict[str, str]:
    """What failed first of each kind."""
    found = dict[str, str]()
    for check in checks:
        if not check.kept:
            found.setdefault(check.what, check.fault)
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_any_protocol_of_the_project_is_passed(protocol: GraphProtocol, sound: Path, environment: Environment) -> None:
    checks = examine(protocol, policies(protocol, sound), environment)
    assert faults(checks) == {}
    assert {"episodes end as scripted", "what was said is what trains", "rewards"} <= {one.what for one in checks}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_four_walks_take_every_exit_that_they_can(protocol: GraphProtocol) -> None:
    taken = Counter[tuple[str, str]]()
    for _ in range(4):
        lines = walk(protocol.graph, taken, "42")
        assert [("42" in line.text) for line in lines][:-1] == [False] * (len(lines) - 1)
        assert "42" in lines[-1].text
    exits = {(name, tag) for name, state in protocol.graph.states.items() for tag in state.closes}
    assert exits - {place for place, count in taken.items() if count} == set()


def test_the_shipped_models_play_their_protocols(environment: Environment) -> None:
    together = {"long": Policy(LONG, ("long",)), "short": Policy(SHORT, ("short",))}
    assert faults(examine(LongShort(long_tokens=96, short_tokens=64), together, environment)) == {}
    alone = {"solver": Policy(ROUTER, ("solver",))}
    assert faults(examine(Thinkless(short_tokens=64, think_tokens=256), alone, environment)) == {}


def test_a_partner_speaks_and_is_not_asked_what_it_learns(sound: Path, environment: Environment) -> None:
    checks = examine(LongShort(), {"long": Policy(sound, ("long",))}, environment, partners=["short"])
    assert faults(checks) == {}
    assert [one.of for one in checks if one.what == "rewards"] == ["long"]
    assert [one.of for one in checks if one.what == "chat template"] == ["long"]


def test_two_tokenizers_work_together(tmp_path: Path, sound: Path, environment: Environment) -> None:
    """The second has no token of its own for the tags, and other ids."""
    other = folder(tmp_path) / "tokenizer.json"
    state = json.loads(other.read_text())
    state["added_tokens"] = [token for token in state["added_tokens"] if "|" in token["content"]]
    vocabulary, tags = (
        state["model"]["vocab"],
        ("<think>", "</think>", "<answer>", "</answer>", "</rethink>", "<short>"),
    )
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) not in tags]
    for tag in tags:
        vocabulary[f"nobody says {tag[1:-1]}"] = vocabulary.pop(tag)
    other.write_text(json.dumps(state))
    mixed = {"long": Policy(sound, ("long",)), "short": Policy(tmp_path, ("short",))}
    assert faults(examine(LongShort(), mixed, environment)) == {}
    thinkless = examine(Thinkless(), {"solver": Policy(tmp_path, ("solver",))}, environment)
    assert "must be one token of the vocabulary; ['<short>', '<think>']" in faults(thinkless)["control tokens"]


def set_template(find: str, put: str) -> Edit:
    def edit(tokenizer: PreTrainedTokenizerFast) -> None:
        assert find in str(tokenizer.chat_template)
        tokenizer.chat_template = str(tokenizer.chat_template).replace(find, put)

    return edit


def normalise(normalizer: normalizers.Normalizer) -> Edit:
    return lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", normalizer)


def drop_tags(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("</think>", ""), decoders.ByteLevel()])


def test_a_damaged_tokenizer(tmp_path: Path, environment: Environment) -> None:
    file = folder(tmp_path) / "tokenizer.json"
    file.write_text(file.read_text()[:-100])
    found = faults(examine(Thinkless(), policies(Thinkless(), tmp_path), environment))
    assert "must hold a model's config and its tokenizer" in found["config and tokenizer load"]


class TestFaultsOfATokenizer:
    def found(self, to: Path, environment: Environment, edit: Edit | None = None, **changes: int) -> dict[str, str]:
        model = folder(to, edit, **changes)
        return faults(examine(LongShort(), policies(LongShort(), model), environment))

    def test_a_template_that_forces_a_thought(self, tmp_path: Path, environment: Environment) -> None:
        forced = set_template("add_generation_prompt %}<|assistant|>", "add_generation_prompt %}<|assistant|><think>")
        found = self.found(tmp_path, environment, forced)
        assert "begins every reply with '<think>'" in found["chat template"]
        assert found["episodes end as scripted"].startswith("not played")

    def test_no_template(self, tmp_path: Path, environment: Environment) -> None:
        (template := folder(tmp_path) / "chat_template.jinja").unlink()
        assert not template.exists()
        found = faults(examine(LongShort(), policies(LongShort(), tmp_path), environment))
        assert "has no chat template" in found["chat template"]

    def test_a_template_that_refuses(self, tmp_path: Path, environment: Environment) -> None:
        refusing = set_template(
            "{% if message.role == 'system' %}", "{% if message.role == 'system' %}{{ raise_exception('no') }}"
        )
        found = self.found(tmp_path, environment, refusing)
        assert found.keys() == {"episodes end as scripted"}
        assert "refuses messages with the roles ['system', 'user']" in found["episodes end as scripted"]

    def test_no_end_of_sequence(self, tmp_path: Path, environment: Environment) -> None:
        found = self.found(tmp_path, environment, lambda tokenizer: setattr(tokenizer, "eos_token", None))
        assert "no end-of-sequence token" in found["chat template"]

    def test_messages_that_are_closed_by_a_token_that_ends_nothing(
        self, tmp_path: Path, environment: Environment
    ) -> None:
        found = self.found(
            tmp_path, environment, set_template("{{ message.content }}<|end|>", "{{ message.content }}<|user|>"), ends=4
        )
        assert "one of ['<|end|>']; it closes them with '<|user|>'" in found["replies can end"]

    def test_tokens_without_an_embedding(self, tmp_path: Path, environment: Environment) -> None:
        found = self.found(tmp_path, environment, vocabulary=400)
        assert "goes up to token 471 and the model has 400" in found["tokens have embeddings"]

    def test_tags_that_decoding_drops(self, tmp_path: Path, environment: Environment) -> None:
        found = self.found(tmp_path, environment, drop_tags)
        assert "'</think>' becomes ''" in found["closing tags"]

    def test_tags_that_a_normalizer_changes(self, tmp_path: Path, environment: Environment) -> None:
        def edit(tokenizer: PreTrainedTokenizerFast) -> None:
            normalise(normalizers.Replace("LEFT", "right"))(tokenizer)

        protocol = Solo(stops=("END OF LEFT",))
        model = folder(tmp_path, edit)
        found = faults(examine(protocol, policies(protocol, model), environment))
        assert "'END OF LEFT' becomes 'END OF right'" in found["closing tags"]

    def test_words_that_a_normalizer_changes(self, tmp_path: Path, environment: Environment) -> None:
        found = self.found(tmp_path, environment, normalise(normalizers.Lowercase()))
        assert found.keys() == {"episodes end as scripted"}
        assert "'So far, so good.</think>' became 'so far, so good.</think>'" in found["episodes end as scripted"]

    def test_no_model(self, tmp_path: Path, environment: Environment) -> None:
        found = faults(examine(LongShort(), policies(LongShort(), tmp_path), environment))
        assert "holds no tokenizer.json" in found["config and tokenizer load"]


class NotANumber(Term):
    name = "not a number"

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        return [nan for _ in group]


class Paid(Term):
    name = "paid"

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        return [1.0 for _ in group]


class TestFaultsOfARun:
    def test_seats_that_nobody_or_somebody_else_fills(self, sound: Path, environment: Environment) -> None:
        found = faults(examine(LongShort(), {"long": Policy(sound, ("long",))}, environment))
        assert "['short'] are filled [0] times" in found["each seat is filled once"]
        found = faults(examine(LongShort(), {"all": Policy(sound, ("long", "short", "judge"))}, environment))
        assert "of ['long', 'short']; got ['judge']" in found["each seat is filled once"]

    def test_dialogues_longer_than_the_context(self, sound: Path, environment: Environment) -> None:
        found = faults(examine(LongShort(), policies(LongShort(), sound), environment, context=4000))
        assert found.keys() == {"dialogues fit the context"}
        assert "4608 sampled ones make" in found["dialogues fit the context"]
        assert "the context has 4000" in found["dialogues fit the context"]

    def test_a_budget_without_room_for_an_answer(self, sound: Path, environment: Environment) -> None:
        protocol = Solo(max_tokens=2, stops=("</answer>",))
        found = faults(examine(protocol, policies(protocol, sound), environment))
        assert "a turn of 'solver' in 'solve' must end at '</answer>'" in found["episodes end as scripted"]
        assert "max_tokens of 2" in found["episodes end as scripted"]

    def test_a_grader_that_looks_elsewhere(self, sound: Path) -> None:
        with MathGrader(workers=1, extract=partial(last_marked, marker="####")) as grader:
            environment = arithmetic(grader, count=4)
            found = faults(examine(LongShort(), policies(LongShort(), sound), environment))
            assert "must be graded right; it is unparsable (answer None)" in found["a right answer is graded right"]
            assert "a wrong answer is graded wrong" in found
            assert "must be graded right" in found["episodes are graded as scripted"]
            again = examine(LongShort(), policies(LongShort(), sound), environment, write="#### {}\n".format)
            assert faults(again) == {}

    def test_choices(self, sound: Path) -> None:
        problems = [Problem(str(n), "Which?", letter, choices=("one", "two")) for n, letter in enumerate("ABAB")]
        with MathGrader(workers=1) as grader:
            environment = Environment("choices", problems, grader)
            assert faults(examine(Solo(), policies(Solo(), sound), environment)) == {}

    def test_an_answer_that_the_protocol_does_not_hand_in(self, sound: Path, environment: Environment) -> None:
        class Deaf(GraphProtocol):
            def answer(self, transcript: object) -> str:
                return ""

        graph = TurnGraph(
            seats={"solver": ""}, start="solve", states={"solve": State(seat="solver", closes={"!": END})}
        )
        protocol = Deaf(graph, RewardSum((Correctness(),)))
        found = faults(examine(protocol, policies(protocol, sound), environment))
        assert "is unparsable: look at answer_after of state 'solve'" in found["episodes are graded as scripted"]

    def test_rewards_that_are_no_numbers(self, sound: Path, environment: Environment) -> None:
        protocol = Solo(reward=RewardSum((Correctness(), NotANumber())))
        found = faults(examine(protocol, policies(protocol, sound), environment))
        assert found["rewards"].startswith("a reward must be finite; seat 'solver' in episode")

    def test_rewards_that_do_not_tell_right_from_wrong(self, sound: Path, environment: Environment) -> None:
        protocol = Solo(reward=RewardSum((Paid(),)))
        found = faults(examine(protocol, policies(protocol, sound), environment))
        assert found["rewards"].startswith(
            "a right episode must be paid more than a wrong one; 'solver' is paid 1 and 1"
        )
