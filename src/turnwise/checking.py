"""What a protocol is and what is wrong with it, as `turnwise protocol check` says it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from turnwise.named import FaultyProtocolError, open_protocol
from turnwise.protocols.graph import GraphProtocol, State
from turnwise.protocols.trial import Trial, try_out


@dataclass(frozen=True, slots=True)
class Check:
    """A protocol's seats and states (none for one that is no graph), its bounds, how it went, and all faults.

    The bounds are the most turns and sampled tokens that a conversation can take. Of a protocol that could not even be
    made, there is nothing but a fault.
    """

    name: str
    seats: Sequence[str] = ()
    states: Mapping[str, State] | None = None
    start: str = ""
    most_turns: int | None = None
    most_tokens: int | None = None
    trial: Trial | None = None
    faults: tuple[str, ...] = ()

    @property
    def json(self) -> bytes:
        """All of it, for machines."""
        return orjson.dumps(self, default=_plain, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def check_protocol(name: str) -> Check:
    """Checks a protocol by its name, or in a file. Raises InputError where there is none."""
    try:
        protocol = open_protocol(name)
    except FaultyProtocolError as fault:
        return Check(name, faults=(str(fault),))
    trial = try_out(protocol)
    if not isinstance(protocol, GraphProtocol):
        return Check(name, protocol.seats, trial=trial, faults=trial.faults)
    graph = protocol.graph
    return Check(name, protocol.seats, graph.states, graph.start, *graph.worst_case(), trial, trial.faults)


def show_check(check: Check, console: Console) -> None:
    """Prints it: a row for each state, the bounds, and the faults in red."""
    if check.states:
        table = Table(title=f"{check.name}, seats: {', '.join(check.seats)}", title_justify="left")
        for heading in ("state", "seat", "ends at", "reads", "tokens"):
            table.add_column(heading, justify="right" if heading == "tokens" else "left")
        for name, state in check.states.items():
            ends = [f"{tag} → {target}" for tag, target in state.closes.items()]
            ends.append(f"{'any other end' if ends else 'any end'} → {state.then}")
            reads = "all" if state.reads is None else ", ".join(state.reads) or "the problem alone"
            title = f"{name} (start)" if name == check.start else name
            table.add_row(
                *map(escape, (title, " + ".join(state.seats), "\n".join(ends), reads)), f"≤ {state.max_tokens}"
            )
        console.print(table)
    if check.most_turns is not None:
        console.print(f"at worst {check.most_turns} turns and {check.most_tokens:,} sampled tokens", highlight=False)
    if check.trial is not None:
        trial = check.trial
        console.print(
            f"tried: {trial.conversations} conversations of agents that say anything, of {trial.fewest_turns} to "
            f"{trial.most_turns} turns", highlight=False,
        )  # fmt: skip
    for fault in check.faults:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"faults: {len(check.faults)}", style="red" if check.faults else "green", highlight=False)


def _plain(value: object) -> object:
    if isinstance(value, State):
        return value.model_dump()
    raise TypeError
