"""Two models learn to be right and brief together, as in Long⊗Short: multi-turn RL in alternating rounds.

    python examples/train_longshort.py
    python examples/train_longshort.py --training.rounds "long+short long+short long+short" --output runs/at-once
    python examples/train_longshort.py --brevity "[[0, 0.0]]" --output runs/no-brevity

Each round trains one of the two with the other frozen. Prints what every round came to, as r1⊗r0 (the long model after
its first round, the short one before its own), and how the rounds of one get on with those of the other. Expect the
thoughts to lose their checks and then most of their words. Departs from the paper: models of 0.8 M parameters, groups
of 8 instead of 2, advantages centred for each seat and not divided by their deviation, no KL term, brevity weighs half
as much, and a right answer is always paid more than a wrong one.
"""

from rich.console import Console

from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.control import for_same_tokens
from turnwise.command import run_configured
from turnwise.protocols.solo import Solo
from turnwise.rl.opponent_pool import cells_played, opponent_pool
from turnwise.rl.recipe import LongShortRecipe
from turnwise.rl.summary import summarise
from turnwise.show import play_shown, show_pool, show_results, train_shown
from turnwise.train import open_trainer


def main(recipe: LongShortRecipe) -> None:
    """Trains, then plays the result beside what it started from and each model alone."""
    console = Console()
    with open_trainer(recipe) as trainer:
        train_shown(trainer, console)
        protocol, test, temperature = trainer.protocol, trainer.evaluation, recipe.training.evaluation_temperature
        before = {
            name: TransformersAgent(TransformersEngine.load(policy.model), temperature=temperature)
            for name, policy in trainer.policies.items()
        }
        played = {
            "trained": (protocol, trainer.team(temperature), 1),
            "before": (protocol, before, 1),
            "long alone": (Solo("long", max_tokens=1024, answer_after="</think>"), before, 1),
            "short alone": (Solo("short", max_tokens=recipe.short_tokens, stops=("</answer>",)), before, 8),
        }
        runs = {
            title: play_shown(title, played_by, team, test, console, samples=samples)
            for title, (played_by, team, samples) in played.items()
        }
        pool = opponent_pool(trainer, "long", "short")
    controls = for_same_tokens(runs, "trained", thorough="long alone", brief="short alone")
    rounds = cells_played(trainer.rounds, "long", "short")
    show_pool(pool, rounds, ("long", "short"), summarise(runs["long alone"]), console, folder=recipe.output)
    show_results(runs, test, console, baseline="long alone", controls=controls, results=recipe.output / "results.json")


if __name__ == "__main__":
    run_configured(main, LongShortRecipe)
