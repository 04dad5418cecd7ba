"""Two language models solve problems together by Long⊗Short, beside each of them alone.

    python examples/longshort_math.py                                   # the tiny models that turnwise ships
    python examples/longshort_math.py --problems math-500 --number 100 \\
        --long deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --short Qwen/Qwen2.5-7B-Instruct \\
        --engine vllm --cache-gigabytes 20
    python examples/longshort_math.py --engine server \\
        --url long=http://127.0.0.1:8000/v1 --url short=http://127.0.0.1:8001/v1

Prints a few conversations as they happen, then a table: what was right, in how many tokens, and the AES of each
against the long model alone.
"""

from pathlib import Path
from typing import Annotated

import typer

from turnwise.agents.team import EngineName, open_team
from turnwise.agents.tiny import LONG, SHORT
from turnwise.command import run
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.show import open_environment, play_side_by_side


def main(
    problems: Annotated[str, typer.Option(help="easy, mixed or hard (arithmetic), a benchmark, or a file.")] = "mixed",
    number: Annotated[int, typer.Option(help="How many problems.")] = 96,
    seed: int = 0,
    long: Annotated[str, typer.Option(help="The long-thought model: a folder or a hub id.")] = str(LONG),
    short: Annotated[str, typer.Option(help="The short-thought model: a folder or a hub id.")] = str(SHORT),
    engine: Annotated[EngineName, typer.Option(help="What samples: transformers, vllm, or server.")] = "transformers",
    url: Annotated[list[str] | None, typer.Option(help="The server's base URL, or SEAT=URL for each seat.")] = None,
    key_variable: Annotated[str, typer.Option(help="The environment variable with the server's key.")] = "",
    device: Annotated[str, typer.Option(help="Of transformers; vLLM takes the GPU where there is one.")] = "cpu",
    cache_gigabytes: Annotated[float, typer.Option(help="What each vLLM engine takes beside its weights.")] = 1.0,
    context: Annotated[int | None, typer.Option(help="Of vLLM; by default the model's own.")] = None,
    temperature: float = 0.6,
    max_tokens: Annotated[int, typer.Option(help="Budget of each turn; alone, the long model has four.")] = 512,
    shown: Annotated[int, typer.Option(help="How many conversations to print.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for the episodes; a stopped run goes on there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write accuracy over tokens to this PNG.")] = None,
) -> None:
    """Long⊗Short on mathematics."""
    models = {"long": long, "short": short}
    served = open_team(
        models, engine=engine, temperature=temperature, device=device, urls=url or (), key_variable=key_variable,
        cache_gigabytes=cache_gigabytes, context=context,
    )  # fmt: skip
    with MathGrader() as grader, served as team:
        environment = open_environment(problems, grader, number=number, seed=seed)
        protocols = {
            "long⊗short": LongShort(long_tokens=max_tokens, short_tokens=max_tokens),
            "long alone": Solo("long", max_tokens=4 * max_tokens, answer_after="</think>"),
            "short alone": Solo("short", max_tokens=max_tokens, stops=("</answer>",)),
        }
        settings = {**models, "engine": engine, "temperature": temperature}
        play_side_by_side(
            protocols, team, environment, baseline="long alone",
            seed=seed, shown=shown, output=output, settings=settings, plot=plot,
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
