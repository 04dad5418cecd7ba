r"""Finding the answer in what a model wrote.

Pure functions, linear in the length of the text however hostile it is: the patterns are possessive where they repeat.
"""

import re
from string import ascii_uppercase

# A box, with or without its brace; a line break, unless it is a `\\boxed` escaped once too often; a literal brace,
# which opens nothing in LaTeX; and a brace.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)(?![A-Za-z])\s*+(?P<brace>\{)?+)|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
_BARE = re.compile(r"[^\s{}$\\]++")
_ANNOTATION = re.compile(r"<<[^<>]*+>>")

_STYLE = r"(?:\\(?:text|textbf|textrm|mathrm|mathbf)\s*+\{)?+"
_OPENING = rf"[\s(\[{{$*]*+{_STYLE}[\s(\[*]*+"
_LETTER = re.compile(rf"{_OPENING}(?:([A-Z])[).:\]]|([A-Za-z])[\s)\]}}$*.,:]*+$)")
_ANNOUNCED = re.compile(rf"(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)(?:\s++is\b)?+\s*+:?+{_OPENING}([A-Z])(?!\w)")
_PARENTHESISED = re.compile(r"\(([A-Z])\)")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` or `\fbox{}` that is closed, stripped; None where there is none.

    Of nested boxes the inner one is the last. A box that is never closed, as in a truncated text, is no answer.
    `\boxed 5` without braces holds what follows up to a space, a brace, a dollar or a backslash.
    """
    opened: list[int | None] = []  # for each open brace: where the content of its box starts, or None for another brace
    start, content = -1, None
    for token in _TOKEN.finditer(text):
        if token["brace"]:
            opened.append(token.end())
        elif token["box"]:
            if bare := _BARE.match(text, token.end()):
                start, content = bare.start(), bare[0].rstrip(".,;:")
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened and (begin := opened.pop()) is not None and begin > start:
            start, content = begin, text[begin : token.start()].strip()
    return content


def last_marked(text: str, marker: str = "####") -> str | None:
    """The line after the last `marker`, such as GSM8K's "#### 18"; None where there is none, or nothing after it.

    Calculator annotations such as `<<16-3=13>>` are taken out. For another marker use `functools.partial`.
    """
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    return without_annotations(rest.lstrip().partition("\n")[0]).strip() or None


def without_annotations(text: str) -> str:
    """The text without GSM8K's calculator annotations: `16-3=<<16-3=13>>13` becomes `16-3=13`."""
    return _ANNOTATION.sub("", text)


def balanced(text: str) -> bool:
    """Whether the braces that group, that is, all but escaped ones, pair up."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += token[0].endswith("{") and token[0] != r"\{"
        depth -= token[0] == "}"
        if depth < 0:
            return False
    return depth == 0


def letter_of(answer: str, count: int = 4) -> str | None:
    r"""The letter that a short answer to a question of `count` choices begins with: `\text{B}`, "(B)", "B) 12"."""
    match = _LETTER.match(answer)
    return _among(match[1] or match[2], count) if match else None


def choice_letter(text: str, count: int = 4) -> str | None:
    r"""The letter that a text without a box settles on: "Answer: B", or a last line such as "(B)" or "so it is (B)".

    The last announcement counts. A last line that names two letters in parentheses names none.
    """
    announced = [letter for letter in _ANNOUNCED.findall(text) if _among(letter, count)]
    if announced:
        return str(announced[-1])
    line = text.rstrip().rpartition("\n")[2]
    letters = set(_PARENTHESISED.findall(line))
    return letter_of(line, count) or (_among(letters.pop(), count) if len(letters) == 1 else None)


def _among(letter: str, count: int) -> str | None:
    return letter.upper() if letter.upper() in ascii_uppercase[:count] else None
