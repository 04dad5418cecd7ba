"""What README.md and the pages of docs/ name is there: files, headings, commands and their options."""

import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest
from pydantic import BaseModel
from typer.main import get_command

from turnwise.cli import app
from turnwise.cold_start import ColdStartRecipe
from turnwise.train import recipe_called

ROOT = Path(__file__).parents[1]
COMMANDS = get_command(app).commands


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {"", *(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)}


def has(settings: type[BaseModel], option: str) -> bool:
    name, _, rest = option.removeprefix("--").replace("-", "_").partition(".")
    return name in settings.model_fields and (not rest or has(get_type_hints(settings)[name], rest))


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_what_a_page_names(page: Path) -> None:
    text = page.read_text().replace("\\\n", "")
    for file, heading in re.findall(r"\]\((?!http)([^)#]*)#?(.*?)\)", text):
        assert (page.parent / file).exists(), file
        assert not heading or heading in anchors(page.parent / file), f"{file}#{heading}"
    for file in re.findall(r"\b(?:examples|benchmarks|tests)/[\w./]+\w", text):
        assert (ROOT / file).exists(), file
    for line in re.findall(r"^(?:\S+/)?turnwise (.*)", text, re.M) + re.findall(r"`turnwise ([a-z][^`]*)`", text):
        name, *words = shlex.split(line, comments=True)
        known = {"--config", *(flag for option in COMMANDS[name].params for flag in option.opts)}
        for option in {word for word in words if word.startswith("--")} - known:
            assert has(ColdStartRecipe if name == "cold-start" else recipe_called(words[0]), option), line
