"""What the two papers print of their own results, to be held beside a result on the same benchmark.

Thinkless, table 1 (arXiv 2505.13379v2), and Long⊗Short, its tables of rounds and of other methods (arXiv 2505.11827v2).
Accuracies are shares in [0, 1]; tokens are the papers' own counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

THINKLESS, LONG_SHORT = "Thinkless", "Long⊗Short"


@dataclass(frozen=True, slots=True)
class Printed:
    """One row of a paper's table: what `system` came to.

    `accuracy` is Pass@1 by benchmark, by the benchmarks' names here; `tokens` the mean length on each. Long⊗Short
    prints one length over its benchmarks, `length`, and the score `aes` against the row `base`. `thinks` is the share
    of problems on which a router thought.
    """

    paper: str
    system: str
    accuracy: Mapping[str, float]
    tokens: Mapping[str, float]
    thinks: Mapping[str, float]
    length: float | None = None
    aes: float | None = None
    base: str = ""


_THINKLESS_BENCHMARKS = ("aime-2024", "minerva-algebra", "math-500", "gsm8k")
_LONG_SHORT_BENCHMARKS = ("math-500", "aime-2024", "aime-2025", "gpqa-diamond", "amc-2023")


def _thinkless(
    system: str, accuracy: tuple[float, ...], tokens: tuple[float, ...], thinks: tuple[float, ...] = ()
) -> Printed:
    named = (dict(zip(_THINKLESS_BENCHMARKS, column, strict=False)) for column in (accuracy, tokens, thinks))
    return Printed(THINKLESS, system, next(named), next(named), next(named))


def _long_short(
    system: str, percent: tuple[float, ...], length: float, aes: float, base: str = "R1-Distill-Qwen-7B"
) -> Printed:
    shares = (round(one / 100, 4) for one in percent)
    accuracy = dict(zip(_LONG_SHORT_BENCHMARKS, shares, strict=False))
    return Printed(LONG_SHORT, system, accuracy, {}, {}, length, aes, base)


LLAMA = "R1-Distill-Llama-8B"

PRINTED = (
    _thinkless("DeepSeek-R1-1.5B, always long", (0.2800, 0.9577, 0.8608, 0.8347), (18063, 3029, 5675, 1919)),
    _thinkless("Qwen2.5-Math-1.5B, always short", (0.1133, 0.9184, 0.7604, 0.8572), (1128, 586, 721, 447)),
    _thinkless("Model merging 0.6", (0.1733, 0.9321, 0.7900, 0.8381), (10615, 1091, 3000, 747)),
    _thinkless("CoT-Valve α=4", (0.2267, 0.9439, 0.8036, 0.8108), (17722, 2965, 5820, 1396)),
    _thinkless("Router, random", (0.1467, 0.9211, 0.7608, 0.8205), (8093, 1736, 3096, 1086), (0.56, 0.49, 0.48, 0.51)),
    _thinkless("Router, Qwen-7B", (0.1667, 0.9250, 0.7948, 0.8587), (9296, 795, 2748, 563), (0.47, 0.06, 0.25, 0.02)),
    _thinkless("Thinkless", (0.2733, 0.9459, 0.8184, 0.8418), (7099, 1144, 2555, 624), (1.00, 0.26, 0.52, 0.13)),
    _long_short("R1-Distill-Qwen-7B", (93.40, 53.33, 36.67, 48.98, 95.00), 24566, 0.0),
    _long_short("Qwen2.5-7B", (74.80, 16.67, 7.25, 37.88, 42.50), 1623, -1.33),
    _long_short("Qwen long-r0⊗short-r0", (80.40, 26.67, 13.33, 44.44, 67.50), 7323, -0.75),
    _long_short("Qwen long-r1⊗short-r0", (84.60, 36.67, 23.33, 45.45, 72.50), 2169, -0.08),
    _long_short("Qwen long-r2⊗short-r0", (87.60, 43.33, 26.67, 46.46, 85.00), 2331, 0.32),
    _long_short("Qwen long-r2⊗short-r1", (87.00, 33.33, 26.67, 45.96, 82.50), 2021, 0.12),
    _long_short("Qwen long-r3⊗short-r1", (88.60, 43.33, 30.00, 46.96, 87.50), 2457, 0.43),
    _long_short("Qwen long-r3⊗short-r2", (87.80, 43.33, 26.67, 46.96, 87.50), 2116, 0.38),
    _long_short("Qwen long-r4⊗short-r2", (89.80, 46.67, 33.33, 47.97, 90.00), 2113, 0.61),
    _long_short(LLAMA, (87.20, 43.33, 30.00, 49.49, 90.00), 28496, 0.0, LLAMA),
    _long_short("Llama3.1-8B", (62.80, 10.00, 6.67, 35.86, 22.50), 3713, -1.83, LLAMA),
    _long_short("Llama long-r0⊗short-r0", (73.40, 23.33, 16.67, 40.40, 47.50), 6611, -0.88, LLAMA),
    _long_short("Llama long-r4⊗short-r2", (86.20, 40.00, 33.33, 46.96, 87.50), 2402, 0.81, LLAMA),
    # Of the other methods the accuracies are not known here.
    _long_short("CoD", (), 13229, -0.51),
    _long_short("TALE-EP", (), 16668, -0.08),
    _long_short("C3oT", (), 12576, -0.42),
    _long_short("DAST", (), 10235, -0.74),
    _long_short("O1-Pruner", (), 13467, -0.37),
    _long_short("SimplePO-DAST", (), 17849, -0.69),
    _long_short("Kimi k1.5", (), 17583, -0.65),
)


def printed_for(benchmark: str) -> tuple[Printed, ...]:
    """The rows that have an accuracy on this benchmark."""
    return tuple(row for row in PRINTED if benchmark in row.accuracy)
