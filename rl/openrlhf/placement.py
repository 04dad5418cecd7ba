"""Which process goes to which GPU: Ray's own way of packing bundles, computed beforehand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from turnwise.environments.errors import InputError
from turnwise.rl.openrlhf.settings import OpenRLHFSettings

Role = Literal["rank", "reference", "engine"]

WHOLE = 10_000
"""One GPU or CPU in the units that Ray counts in."""


class Machine(BaseModel):
    """What there is to run on: `nodes` like each other, none of it taken. The defaults are of a node of eight H100.

    `usable` is the share of a GPU's memory that is planned with: the rest is lost between blocks of unlike sizes.
    `teraflops` are those of dense bf16 matrix products (10^12 a second) on one GPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: PositiveInt = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    cpus_per_node: PositiveInt = 64
    gpu_gigabytes: PositiveFloat = 80.0
    usable: Annotated[float, Field(gt=0, le=1)] = 0.92
    teraflops: PositiveFloat = 989.0


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a policy: the `number`-th (from 0) of its role, with `share` of a GPU (`gpu` is None on a CPU).

    Nodes and GPUs are counted from 0. Between nodes that are equally free Ray takes any, so that they may be swapped.
    """

    policy: str
    role: Role
    number: int
    node: int
    gpu: int | None
    share: float


@dataclass(frozen=True, slots=True)
class Group:
    """One placement group: so many like bundles, in ten-thousandths of a CPU and of a GPU."""

    policy: str
    roles: tuple[Role, ...]
    bundles: int
    cpu: int
    gpu: int


@dataclass(slots=True)
class Node:
    """What is left of a node."""

    cpu: int
    gpus: list[int]

    def fits(self, group: Group) -> bool:
        """Whether a bundle still fits, its share of a GPU on one GPU."""
        return self.cpu >= group.cpu and (not group.gpu or max(self.gpus, default=0) >= group.gpu)

    def score(self, group: Group) -> float:
        """Ray's: the shares of what is left that a bundle would leave, added up; it takes the node with the most."""
        wanted = ((group.cpu, self.cpu), (group.gpu, sum(self.gpus)))
        return sum((left - asked) / left for asked, left in wanted if asked)

    def take(self, group: Group) -> int | None:
        """Takes a bundle, and of the GPUs that have room the one with the least left; which that was."""
        self.cpu -= group.cpu
        if not group.gpu:
            return None
        _, number = min((left, number) for number, left in enumerate(self.gpus) if left >= group.gpu)
        self.gpus[number] -= group.gpu
        return number


def groups_of(policies: Mapping[str, bool], settings: OpenRLHFSettings) -> list[Group]:
    """The placement groups in the order in which they are asked for; `policies` says which have a reference model.

    Each policy has one for its engine's actors, and one for its ranks, which a reference model shares; colocated, both
    share the bundles of one.
    """
    found = list[Group]()
    rank, actor = round(settings.gpus_per_rank * WHOLE), round(settings.gpus_per_actor * WHOLE)
    for policy, has_reference in policies.items():
        learning: tuple[Role, ...] = ("rank", "reference") if has_reference else ("rank",)
        if settings.colocated:
            found.append(Group(policy, (*learning, "engine"), settings.ranks, 2 * WHOLE, rank + actor))
        else:
            found.append(Group(policy, ("engine",), settings.actors, WHOLE, actor))
            found.append(Group(policy, learning, settings.ranks, WHOLE, rank))
    return found


def place(policies: Mapping[str, bool], settings: OpenRLHFSettings, machine: Machine) -> list[Process]:
    """All processes, where Ray's strategy PACK puts them. Raises InputError where there is too little room."""
    nodes = [Node(machine.cpus_per_node * WHOLE, [WHOLE] * machine.gpus_per_node) for _ in range(machine.nodes)]
    groups, processes = groups_of(policies, settings), list[Process]()
    for group in groups:
        places = pack(group, nodes)
        if places is None:
            gpus = sum(each.bundles * each.gpu for each in groups) / WHOLE
            cpus = sum(each.bundles * each.cpu for each in groups) / WHOLE
            raise InputError(
                f"a plan must fit the machine; it needs {gpus:g} GPU(s) and {cpus:g} CPU(s), and "
                f"{machine.nodes} node(s) of {machine.gpus_per_node} GPU(s) and {machine.cpus_per_node} CPU(s) have no "
                f"room for the {' and '.join(group.roles)} processes of policy {group.policy!r}: ask for fewer ranks "
                "or actors, less than a GPU each (gpus_per_rank, gpus_per_actor), colocated ones, or more nodes"
            )
        for role in group.roles:
            learning = settings.gpus_per_rank / (1 + ("reference" in group.roles))
            share = settings.gpus_per_actor if role == "engine" else learning
            processes += [
                Process(group.policy, role, number, node, gpu, share) for number, (node, gpu) in enumerate(places)
            ]
    return processes


def pack(group: Group, nodes: list[Node]) -> list[tuple[int, int | None]] | None:
    """Takes all bundles of a group, as many as fit on the best node, then on the next best; None where some are left.

    The (node, GPU) of each. Ray looks at the sum of what a node's GPUs have left, and would wait for ever for a share
    that is left on none of them; that is no room here.
    """
    found, left = list[tuple[int, int | None]](), list(range(len(nodes)))
    while len(found) < group.bundles:
        fitting = [number for number in left if nodes[number].fits(group)]
        if not fitting:
            return None
        best = max(fitting, key=lambda number: nodes[number].score(group))
        while len(found) < group.bundles and nodes[best].fits(group):
            found.append((best, nodes[best].take(group)))
        left.remove(best)
    return found
