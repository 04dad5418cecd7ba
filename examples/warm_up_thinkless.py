"""Stage 1 of Thinkless: a model learns, from pairs of a long and a short answer, to open with `<think>` or `<short>`.

    python examples/warm_up_thinkless.py                # answers of the tiny models on arithmetic; some four minutes
    python examples/warm_up_thinkless.py --pairs pairs.jsonl --student deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B

A file of pairs has the columns "problem", "answer", "think" (reasoning, `</think>`, solution) and "short". Each pair
gives two independent samples; both modes end about equally likely, whatever the problem. The control tokens must be
single tokens of the student's vocabulary, and its chat template must not force one; where it is otherwise, it is said.
"""

from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise.agents.tiny import LONG, NOVICE, ROUTER
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.tables import left_out
from turnwise.cli import fine_tune_shown, play_shown, run_configured, show_results
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.benchmarks import Columns, load_problems
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.sft import SFTSettings
from turnwise.rl.sft_sets import paired_rows, write_set


class Config(BaseModel):
    """A model learns from pairs of a long and a short answer to open with `<think>` or `<short>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: Path | None = None
    long_teacher: str = str(LONG)
    short_teacher: str = str(ROUTER)
    student: str = str(NOVICE)
    problems: PositiveInt = 600
    test_problems: PositiveInt = 200
    sft: SFTSettings = SFTSettings(steps=150, learning_rate=2e-3, weight_decay=0.01)
    seed: int = 0
    output: Path = Path("runs/warm_up_thinkless")


def answered(config: Config, mode: str, grader: MathGrader, console: Console) -> list[Problem]:
    """The problems with the answers of one mode as their solutions: from the file, or by a teacher."""
    if config.pairs:
        return list(load_problems(config.pairs, columns=Columns(solution=mode), limit=config.problems).problems)
    problems = arithmetic(grader, count=config.problems, split="train", seed=config.seed)
    protocol = Solo(max_tokens=1024, answer_after="</think>") if mode == "think" else Thinkless(mode="short")
    model = config.long_teacher if mode == "think" else config.short_teacher
    team = {"solver": TransformersAgent(TransformersEngine.load(model), temperature=0.6)}
    said = play_shown(mode, protocol, team, problems, console, output=config.output, settings={"teacher": model})
    return [replace(episode.transcript.problem, solution=episode.transcript.text) for episode in said]


def main(config: Config) -> None:
    """Writes the pairs, trains on them, and plays the result in the mode of its choice and in each."""
    console, data = Console(), config.output / "pairs.parquet"
    with MathGrader() as grader:
        think, short = (answered(config, mode, grader, console) for mode in ("think", "short"))
        template = TransformersEngine.load(config.student).template
        pairs = [(one, one.solution, other.solution) for one, other in zip(think, short, strict=True)]
        rows, dropped = paired_rows(pairs, template, seed=config.seed)
        if dropped:
            console.print(left_out(dropped, kept=len(rows) // 2, title="Pairs left out"))
        write_set(data, rows)
        fine_tune_shown(
            config.student, data, config.sft, config.output / "router", console, seed=config.seed, together=2
        )
        team = {"solver": TransformersAgent(TransformersEngine.load(config.output / "router" / "model"))}
        test = arithmetic(grader, count=config.test_problems)
        protocols = {"its own choice": Thinkless(), "always think": Thinkless(mode="think")}
        protocols["never think"] = Thinkless(mode="short")
        runs = {title: play_shown(title, played, team, test, console) for title, played in protocols.items()}
    show_results(runs, test, console, baseline="always think", results=config.output / "results.json")


if __name__ == "__main__":
    run_configured(main, Config)
