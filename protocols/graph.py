"""A protocol declared as a graph of turns, checked when it is built."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import networkx as nx
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.transcript import Message, Transcript, Turn
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Reward, RewardSum

END = "end"


class State(BaseModel):
    """A situation in which one seat speaks, or several at once (then none of them sees what the others say in it).

    A turn ends at one of the closing tags in `closes`, which names the state that follows each; where it ends
    otherwise (end of sequence, token budget) `then` follows. Simultaneous turns have but one way to go on. `ask` is put
    to the seat as a message of the user's before it speaks, and `prefill` begins its turn for it. `reads` names the
    states whose turns it reads (None: all of them). `answer_after` is the tag behind which the answer stands. In a
    `control` state every sampled token is a control token, which chooses a mode.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seat: str | tuple[str, ...]
    closes: Mapping[str, str] = {}
    then: str = END
    max_tokens: PositiveInt = 1024
    ask: str = ""
    prefill: str = ""
    reads: tuple[str, ...] | None = None
    answer_after: str = ""
    control: bool = False

    @property
    def seats(self) -> tuple[str, ...]:
        """The seats that speak in this state, in order."""
        return (self.seat,) if isinstance(self.seat, str) else self.seat

    def successors(self) -> dict[str, str]:
        """Every state that can follow, by the closing tag that leads there ("" for `then`)."""
        return {**self.closes, "": self.then}

    def missing_closing(self) -> str:
        """The tag that closes a turn for its readers where the agent did not: the one that leads where `then` does."""
        return next((tag for tag, target in self.closes.items() if target == self.then), "")


class TurnGraph(BaseModel):
    """States joined by closing tags: who may speak after whom.

    `seats` maps each seat to its instruction (its system message; none where empty). In a "shared" dialogue all
    seats continue one message of the assistant's; in "chat" a seat's own turns are the assistant's messages and the
    others' turns, under their names, the user's. At most `max_turns` states are visited (simultaneous turns count as
    one); where the last of them would not end the dialogue, it is `final` instead, if that is given.

    Raises pydantic.ValidationError, which names the state and the fault, for a graph that cannot be played: a state
    that leads nowhere, cannot be reached or cannot end, a seat that is missing or idle, turns without bound, or a worst
    case of more than `token_limit` sampled tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seats: Mapping[str, str]
    start: str
    states: Mapping[str, State] = Field(min_length=1)
    max_turns: PositiveInt | None = None
    final: str | None = None
    dialogue: Literal["shared", "chat"] = "shared"
    token_limit: PositiveInt | None = None

    def digraph(self) -> "nx.MultiDiGraph[str]":
        """States and END as nodes; each edge's `tag` is the closing tag that takes it ("" for any other end)."""
        graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        graph.add_nodes_from([*self.states, END])
        for name, state in self.states.items():
            for tag, target in state.successors().items():
                graph.add_edge(name, target, tag=tag)
        return graph

    def entered(self, name: str, visits: int) -> str:
        """The state that is entered where `name` is due after `visits` others: at the cap `final`, and beyond it END.

        A state that can only end the dialogue needs no `final` in its place.
        """
        if name == END or self.max_turns is None or visits < self.max_turns - 1:
            return name
        if visits >= self.max_turns:
            return END
        return name if self.final is None or self._ends(name) else self.final

    def worst_case(self) -> tuple[int, int]:
        """The most turns, and the most sampled tokens, that one dialogue can take."""
        worst = dict.fromkeys([*self.states, END], (0, 0))
        for visits in reversed(range(self.max_turns or len(self.states))):
            later, worst = worst, {END: (0, 0)}
            for name in self.states:
                state = self.states[self.entered(name, visits)]
                turns, tokens = zip(*(later[target] for target in state.successors().values()), strict=True)
                seats = len(state.seats)
                worst[name] = seats + max(turns), seats * state.max_tokens + max(tokens)
        return worst[self.start]

    def _ends(self, name: str) -> bool:
        return set(self.states[name].successors().values()) == {END}

    @model_validator(mode="after")
    def _check(self) -> "TurnGraph":
        for fault in (self._names, self._seats, self._tags, self._paths, self._bounds):
            if message := fault():
                raise ValueError(message)
        return self

    def _names(self) -> str | None:
        known = f"the states are {', '.join(self.states)}"
        if END in self.states:
            return f"a state may not be called {END!r}, which ends the dialogue; rename it"
        for role, name in (("start", self.start), ("final", self.final)):
            if name is not None and name not in self.states:
                return f"{role} is {name!r}, which is no state; {known}"
        for name, state in self.states.items():
            for tag, target in state.successors().items():
                if target not in self.states and target != END:
                    return (
                        f"state {name!r} leads to {target!r} on {tag or 'any other end'!r}, which is no state; {known}"
                    )
            for read in state.reads or ():
                if read not in self.states:
                    return f"state {name!r} reads {read!r}, which is no state; {known}"
        return None

    def _seats(self) -> str | None:
        speaking = {seat for state in self.states.values() for seat in state.seats}
        for name, state in self.states.items():
            for seat in state.seats:
                if seat not in self.seats:
                    return (
                        f"state {name!r} is for seat {seat!r}, which is missing from seats {list(self.seats)}; add it"
                    )
            if len(set(state.seats)) < len(state.seats) or not state.seats:
                return f"state {name!r} must name each of its seats once; got {state.seats}"
        if idle := [seat for seat in self.seats if seat not in speaking]:
            return f"seat(s) {idle} never speak; give them a state or remove them"
        return None

    def _tags(self) -> str | None:
        for name, state in self.states.items():
            if len(state.seats) > 1 and set(state.closes.values()) - {state.then}:
                return (
                    f"state {name!r} is for several seats, which cannot each choose what follows: all its closing tags "
                    f"must lead where then does, to {state.then!r}"
                )
            for tag in state.closes:
                if not tag.strip():
                    return f"state {name!r} has an empty closing tag; use then for a turn that ends without one"
                if clash := [other for other in state.closes if other != tag and tag in other]:
                    return f"state {name!r}: closing tag {tag!r} is contained in {clash[0]!r}, so both would match"
        return None

    def _paths(self) -> str | None:
        graph = self.digraph()
        roots = {self.start} | ({self.final} if self.final else set())
        reachable = roots.union(*(nx.descendants(graph, root) for root in roots))
        if lost := [name for name in self.states if name not in reachable]:
            return f"state(s) {lost} cannot be reached from {self.start!r}; lead to them or remove them"
        if endless := [name for name in self.states if not nx.has_path(graph, name, END)]:
            return f"state(s) {endless} cannot end: no path leads to END; give one a tag, or then, that does"
        if self.final and not self._ends(self.final):
            return (
                f"final state {self.final!r} must end the dialogue, but leads to {self.states[self.final].successors()}"
            )
        return None

    def _bounds(self) -> str | None:
        if self.max_turns is None:
            if self.final:
                return f"final state {self.final!r} is taken at the cap, but max_turns is not set; set it"
            cycle = next(nx.simple_cycles(nx.DiGraph(self.digraph())), None)
            if cycle:
                return f"states {cycle} form a loop, so that a dialogue need not end; set max_turns"
        if self.token_limit is not None and (worst := self.worst_case()[1]) > self.token_limit:
            costly = max(self.states, key=lambda name: self.states[name].max_tokens)
            return (
                f"at worst {worst} tokens are sampled, over token_limit {self.token_limit}; {costly!r} takes the most"
            )
        return None


class GraphProtocol(ReasoningProtocol):
    """Plays a turn graph and pays by a sum of reward terms."""

    def __init__(self, graph: TurnGraph, reward: RewardSum) -> None:
        self.graph = graph
        self.reward = reward
        self.seats = tuple(graph.seats)
        self.control_states = frozenset(name for name, state in graph.states.items() if state.control)
        # Read at every turn of every episode, where computing them anew from the graph would show.
        self._moves = {name: (len(state.seats), state.successors(), state.then) for name, state in graph.states.items()}
        self._speakers = {name: state.seats for name, state in graph.states.items()}
        self._stops = {name: tuple(state.closes) for name, state in graph.states.items()}
        self._closings = {name: state.missing_closing() for name, state in graph.states.items()}
        self._instructions = {seat: [Message("system", text)] if text else [] for seat, text in graph.seats.items()}
        last = graph.max_turns or 0
        self._capped = {
            visits: {name: graph.entered(name, visits) for name in [*graph.states, END]}
            for visits in ((last - 1, last) if last else ())
        }

    @property
    def fingerprint(self) -> str:
        """The name of the class, and a hash of the graph and the reward."""
        described = f"{self.graph.model_dump_json()} {self.reward}"
        return f"{type(self).__name__} {hashlib.blake2b(described.encode(), digest_size=8).hexdigest()}"

    def next_turns(self, transcript: Transcript) -> list[Turn]:
        """One turn for each seat of the current state that has not spoken in it; none at the end."""
        name, entry = self._situation(transcript)
        if name == END:
            return []
        state, spoken = self.graph.states[name], len(transcript.steps) - entry
        before = transcript.prefix(entry) if spoken else transcript
        return [
            Turn(seat, name, self.view(before, seat, state), self._stops[name], state.max_tokens, state.prefill)
            for seat in self._speakers[name][spoken:]
        ]

    def view(self, transcript: Transcript, seat: str, state: State) -> tuple[Message, ...]:
        """What `seat` reads before it speaks in `state`: its instruction, the problem, and the turns it may read."""
        messages = [*self._instructions[seat], Message("user", transcript.problem.statement)]
        reads, chat = state.reads, self.graph.dialogue == "chat"
        for step in transcript.steps:
            if reads is not None and step.state not in reads:
                continue
            if chat and step.seat != seat:
                messages.append(Message("user", f"{step.seat}: {step.text}"))
                continue
            if step.prefill:
                messages.append(Message("assistant", step.prefill))
            reply = step.reply
            messages.append(Message("assistant", reply.text, reply))
            if reply.stop is None and (closing := self._closings[step.state]):
                messages.append(Message("assistant", closing))
        if state.ask:
            messages.append(Message("user", state.ask))
        return tuple(messages)

    def answer(self, transcript: Transcript) -> str:
        """The last turn's text, from behind its state's `answer_after`; empty where that tag never came."""
        if not transcript.steps:
            return ""
        last = transcript.steps[-1]
        tag = self.graph.states[last.state].answer_after
        if not tag:
            return last.text
        _, found, answer = last.text.rpartition(tag)
        return answer if found else ""

    def rewards(self, group: Sequence[Episode], step: int = 0) -> list[Mapping[str, Reward]]:
        """The protocol's sum of reward terms, for every seat."""
        return self.reward(group, self.seats, step)

    def _situation(self, transcript: Transcript) -> tuple[str, int]:
        """The current state, and the number of steps that were taken before it was entered."""
        name, entry, visits = self.graph.entered(self.graph.start, 0), 0, 0
        for place, step in enumerate(transcript.steps):
            if step.state != name or step.seat != self._speakers[name][place - entry]:
                raise InputError(
                    f"this protocol is in state {name!r} where the transcript has {step.seat!r} in {step.state!r}: "
                    "it was played by another protocol"
                )
            width, successors, then = self._moves[name]
            if place + 1 == entry + width:
                entry, visits = place + 1, visits + 1
                name = successors.get(step.reply.stop or "", then)
                if visits in self._capped:
                    name = self._capped[visits][name]
        return name, entry
