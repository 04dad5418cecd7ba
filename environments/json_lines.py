"""Files of JSON lines that others wrote."""

from collections.abc import Iterator
from pathlib import Path

import orjson


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, one at a time, each with its number from 1."""
    with path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def json_object(line: bytes) -> dict[str, object]:
    """The JSON object that a line is. Raises ValueError, in one line, for what is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"no JSON object, but a {type(record).__name__}")
    return record
