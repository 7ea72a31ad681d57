"""What opening a prepared set of many documents costs a process: seconds and memory.

    python -m skv_tools.bench.documents --documents 10000000 --processes 4 --dir FOLDER

The set is made from random numbers and left in FOLDER for the next time. Every process opens it anew, as training does
(held-out part, windows, order), and reads a hundred samples; all start together. Memory that files are mapped into is
shared and not counted.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np

from skv_dist.commands.entry_point import entry_point
from skv_dist.versions import software

_MEAN_LENGTH = 16  # tokens of a document, its end included


def make(folder: Path, number: int) -> None:
    """A set of bytes, as `skv_dist.data.token_set.write_prepared` would write it."""
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    from skv_dist.data.token_set import META, TOKENS
    from skv_dist.data.tokenizer import ByteTokenizer
    from skv_dist.files import new_folder

    random, tokenizer = np.random.default_rng(0), ByteTokenizer()
    with new_folder(folder) as out:
        lengths = random.integers(2, 2 * _MEAN_LENGTH - 1, number, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        tokens = random.integers(3, 259, int(ends[-1]), dtype=np.uint16)
        tokens[ends - 1] = tokenizer.end_of_document
        tokens.tofile(out / TOKENS)
        with _IndexWriter(str(out / "tokens.idx"), np.uint16) as index:
            index.write(lengths.tolist(), None, range(number + 1))
        hashes = random.integers(0, 2**63, number, dtype=np.uint64)
        hashes.tofile(out / "documents.hash")
        meta = {
            "format": 1,
            "tokenizer": tokenizer.name,
            "tokenizer_fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "begin_of_document": None,
            "end_of_document": tokenizer.end_of_document,
            "examples": False,
            "documents": number,
            "tokens": len(tokens),
            "content": hashlib.sha256(hashes.tobytes()).hexdigest(),
            "sources": [],
        }
        (out / META).write_text(json.dumps(meta))


def _private_bytes() -> int:
    """Memory of this process that no file stands behind (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def open_and_read(folder: Path) -> tuple[float, int, float]:
    """Seconds to open, bytes that it takes, seconds for a hundred samples."""
    import megatron.core.datasets.indexed_dataset  # noqa: F401 (whose import takes seconds, and memory)

    from skv_dist.config.data import DataConfig, SourceConfig
    from skv_dist.data.open import open_data
    from skv_dist.data.tokenizer import ByteTokenizer

    config = DataConfig(sequence_length=1024, sources=[SourceConfig(path=str(folder), format="prepared")])
    before, began = _private_bytes(), time.perf_counter()
    train, _ = open_data(config, ByteTokenizer(), 0, lambda: None)
    opened = time.perf_counter()
    for position in range(100):
        train[position]
    return opened - began, _private_bytes() - before, time.perf_counter() - opened


@entry_point
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--dir", type=Path, required=True, help="folder for the set")
    arguments = parser.parse_args(argv)
    folder = arguments.dir / f"documents-{arguments.documents}"
    if not folder.exists():
        make(folder, arguments.documents)
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        found = pool.map(open_and_read, [folder] * arguments.processes, chunksize=1)
    opened, held, read = (max(figures) for figures in zip(*found))
    print(
        f"{software()}\n{arguments.documents:,} documents, {arguments.processes} processes: opened in {opened:.2f} s, "
        f"{held / arguments.documents:.1f} bytes of memory for each document and process ({held / 2**30:.2f} GiB), a "
        f"hundred samples in {read:.3f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
