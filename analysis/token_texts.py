"""What token ids read, without loading a model."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from turnwise.environments.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenTexts:
    """Some tokenizers, and in `texts`, by the fingerprint of a vocabulary, what each id reads that was asked about."""

    def __init__(self) -> None:
        self.texts: dict[str, dict[int, str]] = {}
        self._tokenizers: dict[str, Tokenizer] = {}

    def load(self, folder: Path) -> None:
        """Loads `tokenizer.json` of a folder, by the package tokenizers: neither transformers nor torch are needed.

        Raises InputError where that is not possible.
        """
        try:
            from tokenizers import Tokenizer  # only where ids are to be read

            from turnwise.agents.chat import fingerprint

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers has no class of its own for a file that it cannot read
            raise InputError(
                f"--tokenizer must name a folder with a tokenizer.json, and 'turnwise[local]' be installed to read it; "
                f"{folder} cannot be loaded: {error}"
            ) from None
        self._tokenizers[fingerprint(tokenizer)] = tokenizer

    def read(self, vocabulary: str, ids: Iterable[int]) -> None:
        """Adds what `ids` read, if the tokenizer of their vocabulary was loaded."""
        if vocabulary not in self._tokenizers:
            return
        texts, tokenizer = self.texts.setdefault(vocabulary, {}), self._tokenizers[vocabulary]
        for id in set(ids) - texts.keys():
            # Behind itself, since some tokenizers drop the space of the first token.
            alone, twice = (tokenizer.decode([id] * times, skip_special_tokens=False) for times in (1, 2))
            texts[id] = twice[len(alone) :]
