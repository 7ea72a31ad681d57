"""Documents printed as a model sees them."""

from itertools import islice

import numpy as np

from skv_dist.config.data import SourceConfig
from skv_dist.data.examples import encode_document
from skv_dist.data.skipped import Skipped
from skv_dist.data.sources import documents
from skv_dist.data.tokenizer import Tokenizer

_GREEN, _PLAIN = "\033[32m", "\033[0m"


def show(sources: list[SourceConfig], tokenizer: Tokenizer, number: int, *, colored: bool) -> None:
    """Print the first ``number`` documents of each source, special tokens spelled out.

    Args:
        colored: what counts in the loss in green, else between « and ».

    Raises:
        UserError: a source cannot be read.
    """
    for source in sources:
        found = islice(documents(source, Skipped(source.path, 1.0), streaming=True), number)
        for place, document in enumerate(found, 1):
            ids, _, answer = encode_document(tokenizer, document)
            counted = len(ids) - 1 if answer is None else int(answer.sum())
            print(f"--- {source.path}, document {place}: {len(ids):,} tokens, of which {counted:,} count in the loss")
            print(_marked(tokenizer, ids, answer, *((_GREEN, _PLAIN) if colored else "«»")), flush=True)


def _marked(tokenizer: Tokenizer, ids: np.ndarray, answer: np.ndarray | None, begin: str, end: str) -> str:
    if answer is None:
        answer = np.ones(len(ids), dtype=bool)
    changes = np.flatnonzero(np.diff(answer)) + 1
    runs = zip(np.split(ids, changes), np.split(answer, changes))
    texts = ((tokenizer.spell(run.tolist()), bool(counts[0])) for run, counts in runs)
    return "".join(f"{begin}{text}{end}" if counts else text for text, counts in texts)
