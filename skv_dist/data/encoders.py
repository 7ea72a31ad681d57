"""Documents to tokens, by several processes that each get the tokenizer once."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess

import numpy as np

from skv_dist.data.examples import Document, TokenDocument, encode_document, num_characters
from skv_dist.data.tokenizer import Tokenizer
from skv_dist.errors import UserError

_BATCH_CHARACTERS = 1 << 18  # of text handed to a process at once
_AHEAD = 4  # batches a process

_tokenizer: Tokenizer | None = None  # of a worker process
Encoded = list[TokenDocument]


def encoded(documents: Iterable[Document], tokenizer: Tokenizer, workers: int) -> Generator[TokenDocument, None, None]:
    """Each document as tokens, in order.

    Raises:
        UserError: a worker was killed, or a document cannot be encoded.
    """
    if workers == 1:
        yield from (encode_document(tokenizer, document) for document in documents)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of torch and tokenizers
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(tokenizer,))
    try:
        waiting: deque[Future[Encoded]] = deque()
        batches = _batches(documents)
        for batch in islice(batches, workers * _AHEAD):
            waiting.append(_submit(pool, batch))
        while waiting:
            done = waiting.popleft().result()
            for batch in islice(batches, 1):
                waiting.append(_submit(pool, batch))
            yield from done
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizing process was killed, perhaps for want of memory: lower --workers (in a run: "
            "data.prepare_workers)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch: list[Document]) -> Future[Encoded]:
    """Hand over a batch, and start a worker where one is wanted.

    It starts with Ctrl-C blocked, as it may arrive before `_start` is reached.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode_batch, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += num_characters(document) + 256
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start(tokenizer: Tokenizer) -> None:
    """In a worker: keep the tokenizer; leave Ctrl-C to the first process, and end with it."""
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # if it is killed, nobody else ends this process
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode_batch(documents: list[Document]) -> Encoded:
    assert _tokenizer is not None
    done = (encode_document(_tokenizer, document) for document in documents)
    small = np.int32  # half of what travels back
    return [document._replace(ids=document.ids.astype(small)) for document in done]
