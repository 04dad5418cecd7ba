r"""The cold start of Long⊗Short: long chains of thought become a first long-thought and a first short-thought model.

    python examples/cold_start.py                       # tiny models on arithmetic; some five minutes on one core
    python examples/cold_start.py --chains r1.jsonl --base Qwen/Qwen2.5-7B-Instruct --opening "" --closing "" \
        --instruction "Put the final answer in \boxed{}." --rollout-tokens 4096 --completer Qwen/Qwen2.5-7B-Instruct \
        --sft.steps 40 --sft.batch-size 32 --sft.micro-batch-size 1 --sft.learning-rate 1e-5 \
        --test math-500 --max-tokens 4096 --device cuda

A file of chains has the columns "problem", "answer" and "response". The output folder gets what each thought is worth
(thoughts.parquet), the sets D_long and D_short, figures, and the two models. Killed, it goes on by the same command.
With `--backend openrlhf` the models learn on OpenRLHF, as `--openrlhf.ranks 8 --openrlhf.zero-stage 3` would have it.

Departures from the paper, for the tiny models' sake: chains are cut by rules unless `--chunker` names a model; the base
is made to answer at once after each prefix (`--closing`); and, unless `--completer` names a model, a rule writes the
short thoughts of arithmetic. One model in several of these places is loaded once.
"""

from pydantic import PositiveInt
from rich.console import Console

from turnwise.cold_start import ColdStartRecipe, cold_start
from turnwise.command import run_configured
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.long_short import LongShort
from turnwise.show import open_environment, play_shown, show_results


class Config(ColdStartRecipe):
    """Long chains of thought become a first long-thought and a first short-thought model, which then play."""

    test: str = "mixed"
    test_problems: PositiveInt = 200


def main(config: Config) -> None:
    """Trains, and plays the result beside the base with the same prompts."""
    console, output = Console(), config.output
    trained = {seat: config.agent(str(model), 0.6) for seat, model in cold_start(config, console).items()}
    untrained = dict.fromkeys(trained, config.agent(config.base, 0.6))
    together = LongShort(long_tokens=config.max_tokens, short_tokens=config.max_tokens)
    played = {
        "trained": (together, trained),
        "base, prompt only": (together, untrained),
        "base, thinking alone": (config.alone(), untrained),
    }
    with MathGrader() as grader:
        test = open_environment(config.test, grader, number=config.test_problems, seed=0)
        runs = {
            title: play_shown(title, played_by, team, test, console, output=output, settings={"base": config.base})
            for title, (played_by, team) in played.items()
        }
    show_results(runs, test, console, baseline="base, thinking alone", results=output / "results.json")


if __name__ == "__main__":
    run_configured(main, Config)
