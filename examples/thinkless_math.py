"""One language model decides for itself whether to think, as Thinkless does, beside always and never thinking.

    python examples/thinkless_math.py                                   # the tiny model that turnwise ships
    python examples/thinkless_math.py --problems math-500 --number 100 --model Vinnnf/Thinkless-1.5B-RL \\
        --engine vllm --cache-gigabytes 20

Prints a few conversations as they happen, then a table: how often it thinks, what was right, in how many tokens, and
the AES of each against always thinking.
"""

from pathlib import Path
from typing import Annotated

import typer

from turnwise.agents.team import EngineName, open_team
from turnwise.agents.tiny import ROUTER
from turnwise.command import run
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.thinkless import Thinkless
from turnwise.show import open_environment, play_side_by_side


def main(
    problems: Annotated[str, typer.Option(help="easy, mixed or hard (arithmetic), a benchmark, or a file.")] = "mixed",
    number: Annotated[int, typer.Option(help="How many problems.")] = 96,
    seed: int = 0,
    model: Annotated[str, typer.Option(help="A self-routing model: a folder or a hub id.")] = str(ROUTER),
    engine: Annotated[EngineName, typer.Option(help="What samples: transformers, vllm, or server.")] = "transformers",
    url: Annotated[list[str] | None, typer.Option(help="The server's base URL.")] = None,
    key_variable: Annotated[str, typer.Option(help="The environment variable with the server's key.")] = "",
    device: Annotated[str, typer.Option(help="Of transformers; vLLM takes the GPU where there is one.")] = "cpu",
    cache_gigabytes: Annotated[float, typer.Option(help="What each vLLM engine takes beside its weights.")] = 1.0,
    context: Annotated[int | None, typer.Option(help="Of vLLM; by default the model's own.")] = None,
    temperature: float = 0.6,
    think_tokens: Annotated[int, typer.Option(help="Budget of a thinking answer.")] = 768,
    short_tokens: Annotated[int, typer.Option(help="Budget of a short answer.")] = 256,
    shown: Annotated[int, typer.Option(help="How many conversations to print.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for the episodes; a stopped run goes on there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write accuracy over tokens to this PNG.")] = None,
) -> None:
    """Thinkless on mathematics."""
    models = {"solver": model}
    served = open_team(
        models, engine=engine, temperature=temperature, device=device, urls=url or (), key_variable=key_variable,
        cache_gigabytes=cache_gigabytes, context=context,
    )  # fmt: skip
    with MathGrader() as grader, served as team:
        environment = open_environment(problems, grader, number=number, seed=seed)
        protocols = {
            "thinkless": Thinkless(short_tokens=short_tokens, think_tokens=think_tokens),
            "always think": Thinkless(think_tokens=think_tokens, mode="think"),
            "never think": Thinkless(short_tokens=short_tokens, mode="short"),
        }
        settings = {"model": model, "engine": engine, "temperature": temperature}
        play_side_by_side(
            protocols, team, environment, baseline="always think",
            seed=seed, shown=shown, output=output, settings=settings, plot=plot,
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
