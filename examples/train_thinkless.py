"""One model learns when to think, as Thinkless does: DeGRPO from the tiny router that turnwise ships.

    python examples/train_thinkless.py
    python examples/train_thinkless.py --learner.loss.aggregation sample-mean --output runs/vanilla     # GRPO instead
    python examples/train_thinkless.py --config my.toml --training.seed 1 --output runs/seed-1

Expect it to stop thinking about chains of a few steps, where a short answer is right, and to think about nearly all of
those of five or six. Departs from the paper: the model has 0.8 M parameters; a short answer has room for four steps of
a chain; sampled at temperature 1; advantages are divided by their deviation, or the hard problems, on which more is at
stake, teach the model to think about everything before it can tell them from easy ones (`--training.estimator
mean-centred` shows it); and α is 0.1 instead of 0.001, since training is a hundred steps and not six hundred. γ is
0.2, to which the authors' own rerun came down: at 0.5 a short answer that is right in 9 of 10 cases would do.
"""

from rich.console import Console

from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.control import for_same_tokens
from turnwise.command import run_configured
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.recipe import ThinklessRecipe
from turnwise.show import play_shown, show_results, train_shown
from turnwise.train import open_trainer


def main(recipe: ThinklessRecipe) -> None:
    """Trains, then plays the result beside what it started from and both modes by force."""
    console = Console()
    with open_trainer(recipe) as trainer:
        train_shown(trainer, console)
        protocol, test, temperature = trainer.protocol, trainer.evaluation, recipe.training.evaluation_temperature
        trained = trainer.team(temperature)["solver"]
        before = TransformersAgent(TransformersEngine.load(recipe.model), temperature=temperature)
        think, short = (
            Thinkless(mode=mode, short_tokens=recipe.short_tokens, think_tokens=recipe.think_tokens)
            for mode in ("think", "short")
        )
        played = {
            "trained": (protocol, trained, 1),
            "before": (protocol, before, 1),
            "always think": (think, before, 1),
            "never think": (short, before, 8),
            "trained, always": (think, trained, 1),
            "trained, never": (short, trained, 1),
        }
        runs = {
            title: play_shown(title, played_by, {"solver": agent}, test, console, samples=samples)
            for title, (played_by, agent, samples) in played.items()
        }
    controls = for_same_tokens(runs, "trained", thorough="always think", brief="never think")
    show_results(
        runs, test, console, baseline="always think", controls=controls, results=recipe.output / "results.json"
    )


if __name__ == "__main__":
    run_configured(main, ThinklessRecipe)
