"""Every round of one policy against every round of another: how much each has come to rely on its own partner."""

from collections.abc import Sequence
from pathlib import Path

from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.environments.errors import InputError
from turnwise.rl.rollout import play
from turnwise.rl.rounds import Round
from turnwise.rl.summary import Summary, summarise
from turnwise.rl.trainer import Trainer


def opponent_pool(trainer: Trainer, policy: str, other: str, *, device: str = "cpu") -> list[list[Summary]]:
    """What each round of `policy` (rows) comes to with each round of `other` on the evaluation's problems.

    The heat map of arXiv 2505.11827. Round 0 is before training; other policies play as they are now.
    """
    temperature = trainer.settings.evaluation_temperature

    def agents(name: str) -> list[TransformersAgent]:
        engines = [
            TransformersEngine.load(weights, device=device) for weights in weights_by_round(trainer.folder, name)
        ]
        return [TransformersAgent(engine, temperature=temperature) for engine in engines]

    def cell(one: TransformersAgent, another: TransformersAgent) -> Summary:
        changed = {policy: one, other: another}
        team = trainer.team(temperature)
        for name, agent in changed.items():
            team |= dict.fromkeys(trainer.policies[name].seats, agent)
        return summarise(play(trainer.protocol, team, trainer.evaluation, seed=trainer.settings.seed))

    columns = agents(other)
    return [[cell(row, column) for column in columns] for row in agents(policy)]


def weights_by_round(folder: str | Path, policy: str) -> Sequence[Path]:
    """The weights that a training run has kept of a policy: before its first round, after its first, and so on."""
    found = {
        int(path.name[1:]): path for path in (Path(folder) / "policies" / policy).glob("r*") if path.name[1:].isdigit()
    }
    if not found:
        raise InputError(f"{folder} holds no weights of a policy {policy!r}: train it first, or name another policy")
    return [found[number] for number in sorted(found)]


def cells_played(rounds: Sequence[Round], policy: str, other: str) -> list[tuple[int, int]]:
    """The (row, column) of the pool that were partners: before training, and after each round."""
    places = [(0, 0)]
    for now in rounds:
        row, column = places[-1]
        places.append((row + (policy in now.trains), column + (other in now.trains)))
    return places
