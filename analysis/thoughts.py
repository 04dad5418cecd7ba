"""What the thoughts of long chains look like once they are weighed: plots, tables, and a chain as a picture."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil
from statistics import fmean, quantiles

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path
from rich.table import Table
from rich.text import Text

from turnwise.environments.errors import InputError
from turnwise.rl.cold_start.thoughts import Thought, WeighedChain
from turnwise.rl.summary import wilson


def success_by_thoughts(weighed: Sequence[WeighedChain], *, enough: float = 0.25, title: str = "") -> Figure:
    """What continuations came to, by how much of the chain the base model was given (arXiv 2505.11827, Fig. 2).

    Above the share that ended right, with its 95% interval, below the mean length in tokens. Each continuation counts
    once; where drawing stopped early, chains that were long in doubt so count for more. On the left by the number of
    thoughts, as far as the share `enough` of the chains goes: fewer and fewer chains, which the brackets count. On the
    right by the share of the chain's tokens: of every chain, always, as many of its first thoughts as that share holds.
    """
    _check(weighed)
    given = range(_reached(weighed, enough) + 1)
    by_number = [[(one, i) for one in weighed if len(one.scores) >= i] for i in given]
    tenths = range(11)
    by_share = [[(one, _thoughts_within(one, tenth)) for one in weighed] for tenth in tenths]
    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    if title:
        figure.suptitle(title)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, groups in enumerate((by_number, by_share)):
        right, tokens = panels[0, column], panels[1, column]
        counts = [[sum(one.right[i] for one, i in group), sum(one.rollouts[i] for one, i in group)] for group in groups]
        lows, highs = zip(*(wilson(*count) for count in counts), strict=True)
        right.plot(range(len(groups)), [hits / drawn for hits, drawn in counts], color="C0", marker="o", ms=4)
        right.fill_between(range(len(groups)), lows, highs, color="C0", alpha=0.2, lw=0)
        spent = [sum(one.rollout_tokens[i] * one.rollouts[i] for one, i in group) for group in groups]
        means = [total / drawn for total, (_, drawn) in zip(spent, counts, strict=True)]
        tokens.plot(range(len(groups)), means, color="C1", marker="o", ms=4)
        for axes in (right, tokens):
            axes.grid(alpha=0.3)
    panels[0, 0].set(title="by number of thoughts", ylabel="continuations that end right", ylim=(-0.02, 1.02))
    panels[0, 0].yaxis.set_major_formatter("{x:.0%}")
    panels[1, 0].set(ylabel="tokens a continuation", xlabel="thoughts given (chains that have as many)")
    panels[1, 0].set_ylim(bottom=0)
    _label(panels[1, 0], given, [len(group) for group in by_number])
    panels[0, 1].set(title=f"by share of the chain: {_many(len(weighed), 'chain')}")
    panels[1, 1].set(xlabel="share of the chain's tokens given, whole thoughts")
    panels[1, 1].set_xticks(tenths[::2], [f"{tenth * 10}%" for tenth in tenths[::2]])
    figure.align_xlabels()
    return figure


def scores_by_position(
    by_samples: Mapping[int, Sequence[WeighedChain]], *, enough: float = 0.25, title: str = ""
) -> Figure:
    """Mean M of the first, second, ... thought, with its quartiles, a line for each N (arXiv 2505.11827, Fig. 3).

    `by_samples` has the same chains for each N, weighed by so many continuations of each prefix; the legend says how
    far M is from the true one at most, at 95% confidence, on average. It goes as far as the share `enough` of the
    chains. Raises InputError where the chains differ: the lines would too, whatever N is.
    """
    if not by_samples:
        raise InputError("scores by position need the weighed chains of at least one number of samples; got none")
    for weighed in by_samples.values():
        _check(weighed)
    if len({frozenset(one.chain for one in weighed) for weighed in by_samples.values()}) > 1:
        sizes = {samples: len(weighed) for samples, weighed in by_samples.items()}
        raise InputError(f"every N needs the same chains, or the lines differ by these; keep those in all of {sizes}")
    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    chains = next(iter(by_samples.values()))
    positions = range(1, _reached(chains, enough) + 1)
    for index, (samples, weighed) in enumerate(sorted(by_samples.items())):
        # Side by side, since bands would hide each other.
        aside, colour = 0.12 * (index - (len(by_samples) - 1) / 2), colormaps["viridis"](index / len(by_samples))
        columns = [[one.scores[i - 1] for one in weighed if len(one.scores) >= i] for i in positions]
        # Of a single score there are no quartiles for `quantiles`; of the same one twice there are.
        cuts = [quantiles(scores * 2 if len(scores) == 1 else scores, n=4, method="inclusive") for scores in columns]
        bound = fmean(error for one in weighed for error in one.errors)
        places = [position + aside for position in positions]
        axes.vlines(places, [low for low, _, _ in cuts], [high for *_, high in cuts], color=colour, alpha=0.4, lw=2.5)
        means = [fmean(scores) for scores in columns]
        axes.plot(places, means, color=colour, marker="o", ms=4, label=f"N = {samples}: ±{bound:.2f}")
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="position of the thought (chains that have it)", ylabel="M, mean and quartiles", title=title)
    _label(axes, positions, [sum(len(one.scores) >= i for one in chains) for i in positions])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="M, at 95% confidence")
    return figure


def thought_statistics(weighed: Sequence[WeighedChain]) -> Table:
    """How many thoughts a chain has, how long they are, and how much of it stays long (arXiv 2505.11827, Table 9)."""
    _check(weighed)
    table = Table(title=f"Thoughts of {_many(len(weighed), 'chain')}", title_justify="left")
    for heading in ("", "all", "stay long", "become short"):
        table.add_column(heading, justify="right" if heading else "left")
    everything = [_thoughts(one) for one in weighed]
    parts = [
        everything,
        [[thought for thought in thoughts if thought[2]] for thoughts in everything],
        [[thought for thought in thoughts if not thought[2]] for thoughts in everything],
    ]
    numbers = [[len(thoughts) for thoughts in part] for part in parts]
    tokens = [[thought.tokens for thoughts in part for thought, *_ in thoughts] for part in parts]
    table.add_row("thoughts", *(f"{sum(number)}" for number in numbers))
    table.add_row("a chain, mean", *(f"{fmean(number):.1f}" for number in numbers))
    table.add_row("a chain, least to most", *(f"{min(number)} to {max(number)}" for number in numbers))
    table.add_row("tokens a thought", *(f"{fmean(lengths):.1f}" if lengths else "" for lengths in tokens))
    table.add_row("share of tokens", *(f"{sum(lengths) / sum(tokens[0]):.1%}" for lengths in tokens), end_section=True)
    chains = Counter(min(number, 4) for number in numbers[1])
    for number in range(1, 5):
        heading = f"chains with {number}{' or more' if number == 4 else ''} long"
        table.add_row(heading, "", f"{chains[number]} ({chains[number] / len(weighed):.0%})", "")
    return table


def kinds(weighed: Sequence[WeighedChain]) -> Table:
    """One row a kind of thought, the commonest first: how many, their mean tokens and M, and what share stays long."""
    _check(weighed)
    by_kind: dict[str, list[tuple[Thought, float, bool]]] = {}
    for one in weighed:
        for thought in _thoughts(one):
            by_kind.setdefault(_printable(thought[0].kind), []).append(thought)
    table = Table(title="Thoughts by kind", title_justify="left")
    for heading in ("", "thoughts", "tokens", "M", "stay long"):
        table.add_column(heading, justify="right" if heading else "left")
    for kind, thoughts in sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0])):
        table.add_row(
            Text(kind),  # a model wrote it: no markup
            f"{len(thoughts)}",
            f"{fmean(thought.tokens for thought, _, _ in thoughts):.1f}",
            f"{fmean(score for _, score, _ in thoughts):+.2f}",
            f"{fmean(long for _, _, long in thoughts):.0%}",
        )
    return table


def savings(weighed: Sequence[WeighedChain], samples: int) -> str:
    """How many continuations were drawn, of those that `samples` of each prefix would have been, in a line."""
    _check(weighed)
    drawn, most = sum(sum(one.rollouts) for one in weighed), max(max(one.rollouts) for one in weighed)
    if most > samples:
        raise InputError(f"samples must be at least the continuations drawn of any prefix, {most}; got {samples}")
    full = samples * sum(len(one.rollouts) for one in weighed)
    return f"{drawn:,} of {full:,} continuations were drawn ({drawn / full:.0%}): {1 - drawn / full:.0%} saved"


# The picture of a chain, in inches: its margins and rows, and what stands where, from the left.
_WIDTH, _ABOVE, _ROW, _BELOW = 10.8, 1.0, 0.44, 0.8
_CHIP, _WORDS, _TOKENS, _SUCCESS, _COUNT, _SCORE = 0.42, 1.1, (5.5, 1.7), (7.35, 1.3), 9.55, 10.65
_DARK, _GREY, _PALE = "#222222", "#666666", "#c8c8c8"
_MOST_CHARACTERS = 1000


def chain_picture(weighed: WeighedChain, *, most_words: int = 12) -> Figure:
    """One chain, a row a thought: its kind and first words, its tokens as a bar coloured by M, and what it led to.

    That is how often the base model, given the chain up to there, ended right, with the 95% interval, and M with how
    far it can be off. Thoughts that stay long are marked. Text stands as it was written, and is never mathematics; what
    matplotlib's font has no glyph for is a box.
    """
    if not weighed.chain.thoughts:
        raise InputError("a picture needs a chain of at least one thought; got none")
    rows = len(weighed.success)
    height = _ABOVE + rows * _ROW + _BELOW
    figure = Figure(figsize=(_WIDTH, height), dpi=150)

    def columns(left: float, width: float) -> Axes:
        axes = figure.add_axes((left / _WIDTH, _BELOW / height, width / _WIDTH, rows * _ROW / height))
        axes.set(ylim=(rows - 0.5, -0.5), yticks=[])
        axes.tick_params(length=0, labelsize=8, labelcolor=_GREY)
        axes.spines[:].set_visible(False)
        axes.patch.set_visible(False)
        return axes

    ground, tokens, success = columns(0, _WIDTH), columns(*_TOKENS), columns(*_SUCCESS)
    ground.set(xlim=(0, _WIDTH), xticks=[])
    _write_rows(ground, weighed, most_words)
    # Equal steps of M are equal steps of colour on both sides of 0, and noise around 0 stays pale.
    widest = max(0.5, *map(abs, weighed.scores))
    norm = Normalize(-widest, widest)
    _draw_tokens(tokens, weighed, norm)
    _draw_success(success, weighed)
    bar = figure.add_axes((_TOKENS[0] / _WIDTH, 0.42 / height, _TOKENS[1] / _WIDTH, 0.12 / height))
    ticks = [-0.25, 0, 0.25, 0.5, 0.75, 1]
    figure.colorbar(ScalarMappable(norm, "RdBu"), bar, orientation="horizontal", ticks=ticks, format="{x:g}")
    bar.set_xlim(min(-0.25, *weighed.scores), widest)
    bar.tick_params(labelsize=8, labelcolor=_GREY, color=_GREY)
    ground.text(_TOKENS[0] - 0.12, rows - 0.5 + (_BELOW - 0.48) / _ROW, "M", ha="right", va="center", color=_GREY)
    return figure


def _write_rows(axes: Axes, weighed: WeighedChain, most_words: int) -> None:
    thoughts, room = weighed.chain.thoughts, _TOKENS[0] - _WORDS - 0.15
    long = [thought.tokens for thought, stays in zip(thoughts, weighed.long, strict=True) if stays]
    share = sum(long) / sum(weighed.chain.lengths)
    plain, bold = FontProperties(size=8.5), FontProperties(size=9.5, weight="bold")
    heading, title = -0.5 - 0.2 / _ROW, FontProperties(size=11, weight="bold")
    question = _fitted(weighed.chain.problem.question, title, _WIDTH - 0.3)
    axes.text(0.15, heading - 0.58 / _ROW, question, va="center", fontproperties=title, parse_math=False)
    said = f"{_many(len(thoughts), 'thought')}, {len(long)} kept long, with {share:.0%} of the tokens"
    axes.text(0.15, heading - 0.3 / _ROW, said, va="center", color=_GREY, size=9)
    headings = {_TOKENS[0]: "tokens", _SUCCESS[0]: "base model ends right"}
    for left, text in headings.items():
        axes.text(left, heading, text, va="center", color=_GREY, size=9)
    axes.text(_SCORE, heading, "M", ha="right", va="center", color=_GREY, size=9)
    axes.axhline(-0.5, color=_PALE, lw=0.8)
    axes.text(_WORDS, 0, "no thought", va="center", color=_GREY, size=9.5)
    for row, counts in enumerate(zip(weighed.right, weighed.rollouts, strict=True)):
        axes.text(_COUNT, row, "{} of {}".format(*counts), ha="right", va="center", size=9)
    for row, (thought, stays) in enumerate(zip(thoughts, weighed.long, strict=True), start=1):
        score, error = weighed.scores[row - 1], weighed.errors[row - 1]
        if stays:
            axes.axhspan(row - 0.5, row + 0.5, color="#eaeef5", lw=0)
        chip = {"boxstyle": "round,pad=0.35", "facecolor": _DARK if stays else "white"}
        axes.text(
            _CHIP, row, "long" if stays else "short", color="white" if stays else _GREY, size=8.5, ha="center",
            va="center", bbox={**chip, "edgecolor": _DARK if stays else _PALE},
        )  # fmt: skip
        axes.text(_WORDS - 0.12, row - 0.09, str(row), ha="right", color=_GREY, size=9.5)
        axes.text(_WORDS, row - 0.09, _fitted(thought.kind, bold, room), fontproperties=bold, parse_math=False)
        words = thought.text.split(maxsplit=most_words)
        said = " ".join(words[:most_words]) + (" …" if len(words) > most_words else "")
        said = _fitted(said, plain, room)
        axes.text(_WORDS, row + 0.29, said, color=_GREY, fontproperties=plain, parse_math=False)
        axes.text(_SCORE, row, f"{score:+.2f} ± {error:.2f}".replace("-", "−"), ha="right", va="center", size=9)


def _draw_tokens(axes: Axes, weighed: WeighedChain, norm: Normalize) -> None:
    lengths = weighed.chain.lengths
    filled = [colormaps["RdBu"](norm(score)) for score in weighed.scores]
    axes.barh(range(1, len(lengths) + 1), lengths, height=0.6, color=filled, edgecolor=_GREY, lw=0.6)
    for row, length in enumerate(lengths, start=1):
        axes.text(length + 0.04 * max(lengths), row, f"{length:,}", va="center", size=9)
    axes.set(xlim=(0, 1.4 * max(lengths)), xticks=[])


def _draw_success(axes: Axes, weighed: WeighedChain) -> None:
    rows, counts = range(len(weighed.success)), zip(weighed.right, weighed.rollouts, strict=True)
    lows, highs = zip(*(wilson(*count) for count in counts), strict=True)
    axes.hlines(rows, lows, highs, color="C0", alpha=0.3, lw=5)
    axes.plot(weighed.success, rows, color="C0", marker="o", ms=5, lw=1.2, clip_on=False)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.grid(axis="x", color=_PALE, lw=0.6)


def _fitted(text: str, font: FontProperties, inches: float) -> str:
    """A text on one line that is no wider than that, cut where it must be."""
    line = _drawable(text[:_MOST_CHARACTERS], font)

    def width(end: int) -> float:
        shown = line[:end] + ("…" if end < len(line) else "")
        return float(text_to_path.get_text_width_height_descent(shown, font, ismath=False)[0]) / 72

    if not line or width(len(line)) <= inches:
        return line
    end = bisect_right(range(len(line)), inches, key=width) - 1
    return line[: max(0, end)].rstrip() + "…"


def _drawable(text: str, font: FontProperties) -> str:
    """The text on one line, with a box for what the font cannot draw, which matplotlib would warn of."""
    fonts = []  # more than one where `font.family` of matplotlib's settings is a list
    for family in font.get_family():
        one = font.copy()
        one.set_family(family)
        fonts.append(get_font(findfont(one)))

    def has(character: str) -> bool:
        return any(one.get_char_index(ord(character)) for one in fonts)

    box = "□" if has("□") else "?"
    return "".join(character if has(character) else box for character in _printable(text))


def _printable(text: str) -> str:
    """The text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _label(axes: Axes, places: Sequence[int], chains: Sequence[int]) -> None:
    """Ticks at some of the places, a dozen at the most, each with its number of chains in brackets."""
    shown = slice(None, None, ceil(len(places) / 12))
    labels = [f"{place}\n({number})" for place, number in zip(places, chains, strict=True)]
    axes.set_xticks(places[shown], labels[shown], fontsize=8)


def _thoughts(weighed: WeighedChain) -> list[tuple[Thought, float, bool]]:
    """Each thought with its score, and whether it stays long."""
    return list(zip(weighed.chain.thoughts, weighed.scores, weighed.long, strict=True))


def _thoughts_within(weighed: WeighedChain, tenths: int) -> int:
    """How many of the first thoughts so many tenths of the chain's tokens hold."""
    lengths = weighed.chain.lengths
    room = tenths * sum(lengths)
    return sum(10 * said <= room for said in accumulate(lengths))


def _reached(weighed: Sequence[WeighedChain], enough: float) -> int:
    """The most thoughts that at least this share of the chains, and one of them, have."""
    numbers = sorted((len(one.scores) for one in weighed), reverse=True)
    return numbers[max(1, ceil(enough * len(numbers))) - 1]


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _check(weighed: Sequence[WeighedChain]) -> None:
    if not weighed:
        raise InputError("there must be at least one weighed chain; got none: look at what the cold start dropped")
