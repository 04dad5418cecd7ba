"""Who trains when: rounds as data."""

from dataclasses import dataclass

from turnwise.environments.errors import InputError


@dataclass(frozen=True, slots=True)
class Round:
    """Training steps in which the policies in `trains` learn, and the others are frozen partners.

    Rounds and steps are counted from 1; `end` is the last step of the round.
    """

    number: int
    trains: tuple[str, ...]
    end: int


def parse_rounds(text: str, steps: int, policies: tuple[str, ...]) -> list[Round]:
    """Rounds of `steps` steps each, from the names of who trains in each.

    Long⊗Short's asynchronous policy optimisation (arXiv 2505.11827, §4.2) is "long long short long short long";
    "long+short" is a round in which both learn at once. Raises InputError for a name that is no policy's.
    """
    rounds = [tuple(names.split("+")) for names in text.split()]
    if not rounds:
        raise InputError(f"training needs at least one round, such as {'+'.join(policies)!r}; got {text!r}")
    for names in rounds:
        if strange := [name for name in names if name not in policies]:
            raise InputError(
                f"rounds name who trains in each, of {list(policies)}, joined by + where several do; got {strange} "
                f"in {text!r}"
            )
        if len(set(names)) < len(names):
            raise InputError(f"a round names each policy that trains in it once; got {'+'.join(names)!r} in {text!r}")
    return [Round(number, names, number * steps) for number, names in enumerate(rounds, start=1)]
