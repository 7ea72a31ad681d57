"""Exact match and token F1 of short answers, as SQuAD defines them (Rajpurkar et al., arXiv 1606.05250)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, once both are normalized, else 0."""
    return _best(lambda reference: float(normalized(answer) == normalized(reference)), references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of words, 0 to 1; the best over the references.

    Where one of the two has no words, 1 if the other has none either, else 0.
    """

    def against(reference: str) -> float:
        given, wanted = normalized(answer).split(), normalized(reference).split()
        if not given or not wanted:
            return float(given == wanted)
        common = sum((Counter(given) & Counter(wanted)).values())
        return 2 * common / (len(given) + len(wanted))

    return _best(against, references)


def _best(score: Callable[[str], float], references: Sequence[str]) -> float:
    return max(map(score, references))
