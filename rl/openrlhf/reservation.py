"""Room on Ray's nodes for the processes of a policy."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from turnwise.environments.errors import InputError

PLACED_WITHIN = 60.0  # seconds


class Share(NamedTuple):
    """So many processes of a kind ("rank", "actor"), each with a CPU and such a part of a GPU."""

    kind: str
    processes: int
    gpus: float


def reserve(*shares: Share) -> tuple[PlacementGroup, Callable[[], None]]:
    """A bundle of resources for each n-th process of all kinds together, and what gives them back.

    Raises InputError where Ray is not running or has too little, in all or left.
    """
    if not ray.is_initialized():
        raise InputError("OpenRLHF needs Ray, which is not running: call ray.init() first")
    count, gpus = shares[0].processes, sum(share.gpus for share in shares)
    bundle = {"CPU": float(len(shares))} | ({"GPU": gpus} if gpus else {})
    there = ray.cluster_resources()
    told = " and ".join(f"{share.processes} {share.kind}(s)" for share in shares)
    fewer = " and ".join(f"{share.kind}s" for share in shares)
    parts = " and ".join(f"gpus_per_{share.kind}" for share in shares)
    for name, amount in bundle.items():
        if count * amount > there.get(name, 0.0):
            raise InputError(
                f"{told} need {count * amount:g} {name}(s), and Ray has {there.get(name, 0.0):g}: ask for fewer "
                f"{fewer}, or set {parts}"
            )
    place = placement_group([bundle] * count, strategy="PACK")
    if not place.wait(timeout_seconds=PLACED_WITHIN):
        remove_placement_group(place)
        raise InputError(f"{told} need {bundle} each, which others of this Ray have taken")
    return place, functools.partial(remove_placement_group, place)
