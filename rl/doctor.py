"""Finds in seconds what would fail in hour three: scripted episodes through a run's tokenizers, tags and graders."""

import asyncio
import functools
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from turnwise.agents.agent import Agent
from turnwise.agents.chat import MARK, ChatTemplate, decode
from turnwise.agents.engine import EngineAgent, StopMatcher
from turnwise.agents.scripted import cut
from turnwise.agents.scripted_engine import ScriptedEngine
from turnwise.agents.transformers_engine import checkpoint, load_tokenizer
from turnwise.environments.environment import Environment, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Turn
from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.rl.rollout import play_episode
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trajectory import trajectories

PROBLEMS, SAMPLES = 4, 2
"""Each of so many problems is played right, and then wrong."""
WRONG = ("987654321", "123456789")
TALK = "So far, so good."


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, on whom, and the fault with its remedy (empty: none)."""

    what: str
    of: str
    fault: str = ""

    @property
    def kept(self) -> bool:
        """Whether there is no fault."""
        return not self.fault


class Line(NamedTuple):
    """What is to be said in a visit of a state, and the closing tag that is to end it ("": end of sequence)."""

    state: str
    text: str
    tag: str


@dataclass(slots=True)
class Patient:
    """A policy or a partner, and what could be loaded of it: its tokenizer and the numbers of its model."""

    name: str
    seats: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    ends: int | list[int] | None
    context: int
    embeddings: int
    engine: ScriptedEngine | None = None
    read: int = 0
    """The most tokens of a prompt, apart from those that were sampled."""


def boxed(answer: str) -> str:
    """The answer as the grader of mathematics finds it."""
    return f"\\boxed{{{answer}}}"


def examine(
    protocol: GraphProtocol,
    policies: Mapping[str, Policy],
    environment: Environment,
    *,
    partners: Collection[str] = (),
    context: int | None = None,
    write: Callable[[str], str] = boxed,
) -> list[Check]:
    """Every check, in order. No weights are loaded.

    `partners` are the seats of agents that have no tokenizer. `context` is that of the engines, by default each model's
    own. `write` puts an answer as the environment's grader is to find it.
    """
    checks = [Check("each seat is filled once", "protocol", _seats(protocol, policies, partners))]
    patients = list[Patient]()
    for name, policy in policies.items():
        try:
            patient = _load(name, policy, context)
        except InputError as error:
            checks.append(Check("config and tokenizer load", name, str(error)))
            continue
        checks += [Check("config and tokenizer load", name), *_tokenizer(patient, protocol.graph)]
        patients.append(patient)
    problems = sorted(environment.problems, key=lambda problem: -len(problem.statement))[:PROBLEMS]
    checks += asyncio.run(_grader(environment, problems, write))
    if all(check.kept for check in checks if check.what in ("each seat is filled once", "chat template")) and (
        len(patients) == len(policies)
    ):
        checks += _played(protocol, patients, partners, environment, problems, write)
    else:
        checks.append(Check("episodes end as scripted", "protocol", "not played: mend what stands above first"))
    return checks


def walk(graph: TurnGraph, taken: Counter[tuple[str, str]], answer: str) -> list[Line]:
    """What is said in one dialogue from its start to its end, by the exits that were `taken` the least so far.

    The answer stands in the last visit. Where the state has its answer behind a tag, so it is.
    """

    @functools.cache
    def best(name: str, visits: int) -> tuple[float, str]:
        """How new the newest way from there to the end is, and the exit with which it begins."""
        if name == END:
            return 0.0, ""
        ways = list[tuple[float, str]]()
        for tag in exits(name):
            following = graph.entered(graph.states[name].successors()[tag], visits + 1)
            ways.append((0.5 ** taken[name, tag] + best(following, visits + 1)[0], tag))
        return max(ways, key=lambda way: way[0])

    def exits(name: str) -> list[str]:
        state = graph.states[name]
        return list(state.closes) if _chooses(state) else [*state.closes, ""]

    lines, name = list[Line](), graph.entered(graph.start, 0)
    while name != END:
        state, (_, tag) = graph.states[name], best(name, len(lines))
        following = graph.entered(state.successors()[tag], len(lines) + 1)
        text = answer if following == END else TALK
        if state.answer_after:
            text = f"{TALK}{state.answer_after}{text}"
        lines.append(Line(name, tag if _chooses(state) else f"{text}{tag}", tag))
        name = following
    taken.update((line.state, line.tag) for line in lines)
    return lines


def _chooses(state: State) -> bool:
    """Whether a turn there is but one token, which is one of its tags."""
    return state.max_tokens == 1 and bool(state.closes)


class _Reader(EngineAgent):
    """Says the lines of one seat in one episode, whatever was said before."""

    def __init__(self, patient: Patient, engine: ScriptedEngine, lines: Iterable[Line]) -> None:
        super().__init__(engine, name=patient.name)
        self._patient, self._script, self._lines = patient, engine, deque(lines)

    async def reply(self, turn: Turn, seed: int) -> Reply:
        """The next line. Raises RuntimeError where the dialogue has taken another way."""
        line = self._lines.popleft() if self._lines else None
        if line is None or line.state != turn.state:
            raise RuntimeError(f"the dialogue is in {turn.state!r}, and the script in {line.state if line else END!r}")
        self._script.line = line.text
        reply = await super().reply(turn, seed)
        heard = sum(len(message.reply.token_ids) for message in turn.messages if message.reply is not None)
        self._patient.read = max(self._patient.read, len(reply.prompt_token_ids) - heard)
        if reply.stop != (line.tag or None) or reply.finish == "length":
            wanted = f"at {line.tag!r}" if line.tag else "with the end of sequence"
            raise RuntimeError(
                f"a turn of {turn.seat!r} in {turn.state!r} must end {wanted}; {reply.text!r} ended by "
                f"{reply.finish!r} at {reply.stop!r}: look at its closing tags, and its max_tokens of {turn.max_tokens}"
            )
        if reply.text != line.text:
            raise RuntimeError(
                f"what {turn.seat!r} says must stay as it is in its tokens; {line.text!r} became {reply.text!r}: "
                "remove the tokenizer's normalizer, or give it a decoder that keeps all"
            )
        return reply


class _Speaker(Agent):
    """Says the lines of a seat whose agent works on text alone."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = deque(lines)

    async def reply(self, turn: Turn, seed: int) -> Reply:
        """The next line, in words."""
        return cut(self._lines.popleft().text, turn)


def _seats(protocol: GraphProtocol, policies: Mapping[str, Policy], partners: Collection[str]) -> str:
    filled = Counter([*partners, *(seat for policy in policies.values() for seat in policy.seats)])
    if strange := sorted(filled.keys() - set(protocol.seats)):
        return f"policies and partners fill seats of this protocol, of {list(protocol.seats)}; got {strange}"
    if wrong := [seat for seat in protocol.seats if filled[seat] != 1]:
        return (
            f"each seat must be filled by one policy or partner; {wrong} are filled {[filled[seat] for seat in wrong]} "
            "times: give each to one"
        )
    return ""


def _load(name: str, policy: Policy, context: int | None) -> Patient:
    """Raises InputError for what is no checkpoint."""
    path = checkpoint(policy.model)
    try:
        tokenizer, config = load_tokenizer(path), AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # of any class, as tokenizers has it
        raise InputError(
            f"{path} must hold a model's config and its tokenizer: {str(error).strip().splitlines()[0]}"
        ) from error
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # it has none
        ends = model.generation_config.eos_token_id
    largest = int(getattr(config.get_text_config(), "max_position_embeddings", 2**31))
    embeddings = int(model.get_input_embeddings().num_embeddings)
    return Patient(name, policy.seats, tokenizer, ends, min(context or largest, largest), embeddings)


def _tokenizer(patient: Patient, graph: TurnGraph) -> list[Check]:
    """What can be seen without a dialogue. Sets the patient's engine, where its template is fit for one."""
    name, tokenizer = patient.name, patient.tokenizer
    largest = max(tokenizer.get_vocab().values())
    fault = ""
    if largest >= patient.embeddings:
        fault = (
            f"every token must have an embedding; the tokenizer goes up to token {largest} and the model has "
            f"{patient.embeddings}: call model.resize_token_embeddings(len(tokenizer)), and save both"
        )
    checks = [Check("tokens have embeddings", name, fault)]
    try:
        engine = ScriptedEngine(tokenizer, name=name, context=patient.context, end_tokens=patient.ends)
    except InputError as error:
        return [*checks, Check("chat template", name, str(error))]
    patient.engine = engine
    checks += [Check("chat template", name), Check("replies can end", name, _end_fault(engine))]
    for state_name, state in graph.states.items():
        for seat in [seat for seat in state.seats if seat in patient.seats and state.closes]:
            of = f"{name}: {seat} in {state_name}"
            turn = Turn(seat, state_name, (), tuple(state.closes), state.max_tokens)
            try:
                engine.template.check_control_tokens(turn)
            except InputError as error:
                checks.append(Check("control tokens", of, str(error)))
            else:
                if _chooses(state):
                    checks.append(Check("control tokens", of))
                checks.append(Check("closing tags", of, _tag_fault(engine.template, turn.stops, alone=_chooses(state))))
    return checks


def _end_fault(engine: ScriptedEngine) -> str:
    """Whether the token with which the template closes the model's messages is one that ends a reply."""
    dialogue = [{"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}]
    _, _, closing = str(engine.tokenizer.apply_chat_template(dialogue, tokenize=False)).partition(MARK)
    first = engine.template.tokens(closing.lstrip())[:1]
    if first and first[0] in engine.ends:
        return ""
    named = decode(engine.tokenizer, first) if first else "nothing"
    ends = [decode(engine.tokenizer, [token]) for token in sorted(engine.ends)]
    return (
        f"the chat template must close the model's messages with a token that ends a reply, one of {ends}; it closes "
        f"them with {named!r}: set tokenizer.eos_token, or eos_token_id in generation_config.json, to that"
    )


def _tag_fault(template: ChatTemplate, stops: tuple[str, ...], *, alone: bool) -> str:
    """Whether each tag, behind other words or alone, is found where it ends, and not before."""
    matcher = StopMatcher(template.tokenizer, stops)
    for tag in stops:
        if (back := decode(template.tokenizer, template.tokens(tag))) != tag:
            return (
                f"a closing tag must survive its tokens; {tag!r} becomes {back!r}: add it with tokenizer.add_tokens, "
                "or remove the tokenizer's normalizer"
            )
        ids = template.tokens(tag if alone else TALK + tag)
        found = [(size, stop) for size in range(1, len(ids) + 1) if (stop := matcher.match(ids[:size]))]
        if found[:1] != [(len(ids), tag)]:
            return (
                f"a closing tag must be found with its last token; {tag!r} "
                f"{'is found too early' if found else 'is never found'}: add it with tokenizer.add_tokens"
            )
    return ""


async def _grader(environment: Environment, problems: Sequence[Problem], write: Callable[[str], str]) -> list[Check]:
    """Whether the grader finds the right answer right, a wrong one wrong, and no answer unparsable."""
    checks = list[Check]()
    for what, answer, expected in (
        ("a right answer is graded right", _right, Outcome.RIGHT),
        ("a wrong answer is graded wrong", _wrong, Outcome.WRONG),
        ("no answer is unparsable", None, Outcome.UNPARSABLE),
    ):
        fault = ""
        for problem in problems:
            said = write(answer(problem)) if answer else ""
            grade = await environment.grader.grade(problem, said)
            if grade.outcome is not expected:
                fault = fault or (
                    f"{said!r} must be graded {expected}; it is {grade.outcome} (answer {grade.answer!r}) on "
                    f"{problem.id}: give the environment the grader that reads its answers"
                )
        checks.append(Check(what, environment.name, fault))
    return checks


def _played(
    protocol: GraphProtocol,
    patients: Sequence[Patient],
    partners: Collection[str],
    environment: Environment,
    problems: Sequence[Problem],
    write: Callable[[str], str],
) -> list[Check]:
    taken, groups = Counter[tuple[str, str]](), list[list[Episode]]()
    for problem in problems:
        groups.append([])
        for sample in range(SAMPLES):
            # The same way both times, so that nothing but the answer can make a difference to the rewards.
            counts = taken if sample else Counter(taken)
            lines = walk(protocol.graph, counts, write((_wrong if sample else _right)(problem)))
            own = {
                seat: [line for line in lines if seat in protocol.graph.states[line.state].seats]
                for seat in protocol.seats
            }
            team: dict[str, Agent] = {seat: _Speaker(own[seat]) for seat in partners}
            for patient in patients:
                assert patient.engine is not None, "its chat template is fit for one"
                team |= {seat: _Reader(patient, patient.engine, own[seat]) for seat in patient.seats}
            try:
                episode = asyncio.run(play_episode(protocol, team, environment.grader, problem, sample=sample))
            except InputError as error:
                return [Check("episodes end as scripted", "protocol", str(error))]
            if episode.error is not None:
                return [Check("episodes end as scripted", "protocol", episode.error)]
            groups[-1].append(episode)
    checks = [Check("episodes end as scripted", "protocol")]
    checks += [Check("dialogues fit the context", patient.name, _context(patient, protocol)) for patient in patients]
    checks.append(Check("episodes are graded as scripted", "protocol", _graded(groups)))
    for patient in patients:
        checks.append(Check("what was said is what trains", patient.name, _trained(patient, groups)))
        checks.append(Check("rewards", patient.name, _rewards(protocol, patient, groups)))
    return checks


def _context(patient: Patient, protocol: GraphProtocol) -> str:
    most = patient.read + protocol.graph.worst_case()[1]
    if most <= patient.context:
        return ""
    return (
        f"the longest dialogue must fit the context; prompts of {patient.read} tokens and {most - patient.read} "
        f"sampled ones make {most}, and the context has {patient.context}: lower the protocol's budgets or turns, or "
        "take a model with a longer context"
    )


def _graded(groups: Sequence[Sequence[Episode]]) -> str:
    for group in groups:
        for episode, expected in zip(group, (Outcome.RIGHT, Outcome.WRONG), strict=True):
            assert episode.grade is not None, "an episode without an error has a grade"
            if episode.grade.outcome is not expected:
                return (
                    f"{episode.id} must be graded {expected}; its last turn, {episode.transcript.steps[-1].text!r}, is "
                    f"{episode.grade.outcome}: look at answer_after of state {episode.transcript.steps[-1].state!r}"
                )
    return ""


def _trained(patient: Patient, groups: Sequence[Sequence[Episode]]) -> str:
    for episode in (episode for group in groups for episode in group):
        for seat in patient.seats:
            said = [step.reply for step in episode.transcript.steps if step.seat == seat]
            found = trajectories(episode, seat)
            turns = [one.sequence.token_ids[turn.start : turn.end] for one in found for turn in one.turns]
            if turns != [reply.token_ids for reply in said]:
                return f"each token that {seat!r} said must be trained once, as it was said; in {episode.id} it is not"
            largest = max((token for one in found for token in one.sequence.token_ids), default=0)
            if largest >= patient.embeddings:
                return f"{seat!r} reads or says token {largest} in {episode.id}; the model has {patient.embeddings}"
    return ""


def _rewards(protocol: GraphProtocol, patient: Patient, groups: Sequence[Sequence[Episode]]) -> str:
    for group in groups:
        try:
            paid = protocol.rewards(group)
        except InputError as error:
            return str(error)
        for seat in patient.seats:
            totals = [rewards[seat].total for rewards in paid]
            if not totals[0] > totals[1]:
                return (
                    f"a right episode must be paid more than a wrong one; {seat!r} is paid {totals[0]:g} and "
                    f"{totals[1]:g} on {group[0].transcript.problem.id}: give the sum a term for it, or "
                    "right_beats_wrong"
                )
    return ""


def _right(problem: Problem) -> str:
    return problem.answer


def _wrong(problem: Problem) -> str:
    if problem.choices:
        return "B" if problem.answer == "A" else "A"
    return WRONG[problem.answer == WRONG[0]]
