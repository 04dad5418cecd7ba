"""Answers that say they overthink or should rethink, as Long⊗Short counts its "aha" moments (arXiv 2505.11827)."""

import re
from collections.abc import Mapping

from turnwise.environments.episode import Episode

PHRASES: Mapping[str, str] = {
    "overthink": r"over[- ]?(?:think(?:s|ing)?|thought)",
    "rethink": r"re-?(?:think(?:s|ing)?|thought)",
    "think again": r"think (?:again|twice|(?:it|this|that) (?:over|through) again)",
    "reconsider": r"reconsider(?:s|ed|ing)?",
}
"""What is looked for, whatever its case. The paper names no list: these are its two words and what means the second."""

# A tag such as </rethink> is a move in the protocol and says nothing.
_FOUND = {name: re.compile(rf"(?<![\w/<-]){phrase}(?![\w>])", re.IGNORECASE) for name, phrase in PHRASES.items()}


def phrases_in(episode: Episode) -> tuple[str, ...]:
    """The names of the phrases that one seat or another said; what a protocol put in its mouth does not count."""
    said = [step.reply.text for step in episode.transcript.steps]
    return tuple(name for name, phrase in _FOUND.items() if any(phrase.search(text) for text in said))
