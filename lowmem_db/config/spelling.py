"""What was probably meant by a name that is not known: the same words with a typo, never other words."""

import difflib
import re
from collections.abc import Iterable

_ALIKE = 0.72


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name whose words are all those of a name, up to a typo in each; None if there is none.

    A word too many or too few has a meaning, and so has a digit.
    """
    candidates = list(dict.fromkeys(known))
    joined = {_joined(candidate): candidate for candidate in candidates}
    if _joined(name) in joined:
        return joined[_joined(name)]
    alike = [candidate for candidate in candidates if _are_typos(name, candidate)]
    return next(iter(difflib.get_close_matches(name, alike, n=1, cutoff=0.0)), None)


def _joined(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _are_typos(name: str, known: str) -> bool:
    given, words = re.split(r"[\W_]", name.lower()), re.split(r"[\W_]", known.lower())
    if len(given) != len(words) or re.sub(r"\D", "", name) != re.sub(r"\D", "", known):
        return False
    return all(difflib.SequenceMatcher(None, *pair).ratio() >= _ALIKE for pair in zip(given, words, strict=True))
