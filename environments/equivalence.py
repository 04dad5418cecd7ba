r"""Whether an answer is the same mathematical object as the gold answer.

`decide` settles at once what is certain without algebra. `compare` asks math-verify; it may take for ever, in C code at
that, and is therefore called in worker processes only.
"""

import logging
import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

from turnwise.environments.answers import balanced, last_boxed
from turnwise.environments.environment import Outcome

MAX_LENGTH = 2_000
"""Characters; the longest gold answer of MATH has fewer than 200. Longer answers are not parsed."""

_FORBIDDEN = re.compile("[\0\ud800-\udfff]")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\\!|\{,\})(?=[0-9]{3})")
_NUMBER = re.compile(r"([-+\u2212]?)\s*(?:\\?\$)?\s*((?:[0-9]{1,3}(?:(?:,|\\,|\\ | )[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?)")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|textnormal|mathrm|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[\w\s.,:'-]{2,}")
_TEXT_AT_END = re.compile(rf"(?<=\S)(?:\s|\\[ ,])*{_TEXT.pattern}(?:\^\{{?[23]\}}?)?$")
_WORDS_AT_END = re.compile(r"(?<=[0-9}])\s+([A-Za-z ]+)$")
_SHORT_UNITS = {"cm", "mm", "km", "kg", "ft", "lb", "oz"}
_NOT_UNITS = re.compile(
    r"(?i)\b(?:hundred|thousand|[mbtr]+illion|dozen|percent\w*|[ap]\.?m|and|or|plus|minus|times|squared|cubed|factorial|mod"
    r"|alpha|beta|gamma|delta|theta|lambda|mu|phi|psi|omega|sqrt|sin|cos|tan|log|exp|inf\w*)\b|[^\w\s./-]"
)
_BASE = re.compile(r"-?[0-9][0-9A-Za-z,.]*_\{?([0-9]+)\}?")
_ADJACENT_NUMBERS = re.compile(r"frac\s*[0-9]\s*[0-9]|([0-9](?:\s|~|\\[ ,;:!])+[0-9])")

# The whole answer has to parse: math-verify otherwise goes on to search it for something that does, and so finds a
# right number within a wrong answer. Its removal of units is off, since it takes "5 t" for 5 tonnes and breaks "b + c".
_CONFIG = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
_CONFIG = replace(_CONFIG, normalization_config=replace(_CONFIG.normalization_config, units=False))


def tidy(answer: str) -> str:
    r"""The answer without box and math delimiters around it, punctuation at its end, and `\!` spaces."""
    if r"\boxed" in answer:
        answer = last_boxed(answer) or answer
    answer = _THOUSANDS.sub("", answer).replace(r"\!", "").strip()
    if not answer.endswith(".."):
        answer = answer.rstrip(".,; ")
    for opening, closing in _DELIMITERS:
        inner = answer[len(opening) : -len(closing)]
        if len(answer) > 2 and answer.startswith(opening) and answer.endswith(closing) and "$" not in inner:
            return inner.strip()
    return answer


def decide(gold: str, answer: str) -> Outcome | None:
    """The outcome where it is certain without algebra, and None where `compare` has to say. Linear in the answer."""
    if len(answer) > MAX_LENGTH or _FORBIDDEN.search(answer) or not balanced(answer):
        return Outcome.UNPARSABLE
    gold, answer = tidy(gold), tidy(answer)
    if not answer:
        return Outcome.UNPARSABLE
    if gold == answer or _same_words(gold, answer):
        return Outcome.RIGHT
    expected, given = number(gold), number(answer)
    if expected is not None and given is not None:
        return _decide_numbers(expected, given)
    if given is None and _has_adjacent_numbers(answer):
        return Outcome.UNPARSABLE
    bases = [_BASE.fullmatch(_TEXT.sub(r"\1", text)) for text in (gold, answer)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return Outcome.WRONG
    return None


def number(answer: str) -> Fraction | None:
    r"""The exact value of a plain integer or decimal; it may have a dollar sign and thousands separators."""
    match = _NUMBER.fullmatch(answer)
    digits = re.sub(r"[^0-9.]", "", match[2]) if match else ""
    if not match or digits in ("", "."):
        return None
    value = Fraction(digits.removesuffix("."))
    return value if match[1] in ("", "+") else -value


def parses(gold: str) -> bool:
    """Whether math-verify can read a gold answer. Not to be called where it must return."""
    gold = tidy(gold)
    return number(gold) is not None or (not _has_adjacent_numbers(gold) and bool(_parse(gold)))


def compare(gold: str, answer: str) -> Outcome:
    """What math-verify says of an answer that `decide` left open. Not to be called where it must return."""
    # math-verify's comparison is not symmetric: the gold answer goes first.
    expected, given = _parse(tidy(gold)), _parse(tidy(answer))
    if not given:
        return Outcome.UNPARSABLE
    return Outcome.RIGHT if verify(list(expected), list(given), timeout_seconds=None) else Outcome.WRONG


def prepare_worker() -> None:
    """Make a worker process ready, so that its first answer takes no longer than the others."""
    # math-verify warns that its own time limit is off. It is: the limit there is for each of several steps, needs the
    # main thread, and cannot end C code; whoever calls `compare` has a better one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    compare(r"\frac{1}{2}", "x+0.5")


@lru_cache(maxsize=4096)
def _parse(answer: str) -> tuple[object, ...]:
    boxed = rf"\boxed{{{_without_unit(answer)}}}"
    return tuple(
        parse(boxed, [_CONFIG], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
    )


def _without_unit(answer: str) -> str:
    r"""The answer without a unit at its end, as in `5\text{ cm}^2` and "18 dollars", but not in `5\text{ million}`."""
    match = _TEXT_AT_END.search(answer)
    if match is None:
        match = _WORDS_AT_END.search(answer)
        if match is None or not all(len(word) > 2 or word in _SHORT_UNITS for word in match[1].split()):
            return answer
    return answer if _NOT_UNITS.search(match[1]) else answer[: match.start()]


def _decide_numbers(expected: Fraction, given: Fraction) -> Outcome | None:
    if expected == given:
        return Outcome.RIGHT
    # Where decimals differ by less, math-verify's rounding has its say, as it has for 1/3 and 0.333333.
    return Outcome.WRONG if abs(expected - given) > Fraction(1, 10**5) else None


def _same_words(gold: str, answer: str) -> bool:
    r"""Whether both are the same text, at least one of them in `\text{}`, but for case and spaces."""
    plain = [_TEXT.sub(r"\1", text) for text in (gold, answer)]
    if plain == [gold, answer] or not all(_WORDS.fullmatch(text) for text in plain):
        return False
    return plain[0].casefold().split() == plain[1].casefold().split()


def _has_adjacent_numbers(answer: str) -> bool:
    # math-verify adds up "3 2" to 5, and multiplies in "10 000".
    return any(match[1] for match in _ADJACENT_NUMBERS.finditer(answer))
