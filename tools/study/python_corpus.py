"""A small corpus from the Python source on this machine, for studies: standard library and installed packages.

    python -m skv_tools.study.python_corpus --out runs/study/python --held-out networkx aiohttp

Writes ``tokenizer`` (a byte-level BPE trained on the training text), the prepared sets ``train`` and ``validation``,
and ``about.md``. Validation text comes from the packages held out, and gives exactly ``--validation-sequences``
sequences: a run with ``eval.samples`` set to that number is measured on the same text whatever its seed.
"""

import argparse
import hashlib
import json
import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from skv_dist.commands.entry_point import entry_point
from skv_dist.errors import UserError
from skv_dist.files import new_folder

PREPARE = "skv_dist.commands.prepare_data"  # the module behind skv-data
LARGEST = 200_000  # bytes of a file: larger ones are mostly tables
END = "<|endoftext|>"


def collect() -> dict[str, dict[str, str]]:
    """Package to digest to text; no text twice, in whichever package; in an order that looks random and is fixed."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    packages = {Path(folder) for folder in [*site.getsitepackages(), sysconfig.get_path("purelib")]}
    packages_found: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for root in sorted([*packages, stdlib]):
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts
            if parts[0] in ("site-packages", "dist-packages") or not file.is_file():
                continue
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if not 200 <= len(data) <= LARGEST or digest in seen:
                continue
            seen.add(digest)
            name = "stdlib" if root == stdlib else parts[0].removesuffix(".py")
            packages_found.setdefault(name, {})[digest] = data.decode("utf-8", errors="replace")
    return packages_found


def train_tokenizer(texts: list[str], vocab_size: int, out: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(str(out))
    return tokenizer


def choose(texts: list[str], lengths: list[int], sequences: int, length: int) -> list[str]:
    """Texts that give exactly so many sequences: each is followed by an end token, the last sequence by one token."""
    chosen, num_tokens = [], 0
    for text, tokens in zip(texts, lengths):
        if num_tokens <= sequences * length and num_tokens + tokens + 1 <= (sequences + 1) * length:
            chosen.append(text)
            num_tokens += tokens + 1
    if num_tokens <= sequences * length:
        raise UserError(f"the packages of --held-out hold too little text for {sequences} sequences: name more")
    return chosen


@entry_point
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m skv_tools.study.python_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--held-out", nargs="+", required=True, metavar="PACKAGE", help="for validation")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--tokenizer-mb", type=int, default=64, help="text it learns from (default: 64)")
    parser.add_argument("--validation-sequences", type=int, default=256)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--limit-mb", type=int, help="take only so much training text")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizing processes")
    arguments = parser.parse_args(argv)
    with new_folder(arguments.out) as unfinished:
        about = write_corpus(arguments, unfinished)
    print(about)
    return 0


def write_corpus(arguments: argparse.Namespace, out: Path) -> str:
    """Fill the folder ``out``; what ``about.md`` says."""
    packages = collect()
    held = [name for name in arguments.held_out if name in packages]
    kept = {digest: text for name in packages if name not in held for digest, text in packages[name].items()}
    texts, room = [], (arguments.limit_mb or 10**6) * 10**6
    for digest in sorted(kept):
        if room > 0:
            texts.append(kept[digest])
            room -= len(kept[digest])
    mean = sum(map(len, texts)) // len(texts)
    sample = texts[: max(1, arguments.tokenizer_mb * 10**6 // mean)]
    tokenizer = train_tokenizer(sample, arguments.vocab_size, out / "tokenizer")
    apart = {digest: text for name in held for digest, text in packages[name].items()}
    candidates = [apart[digest] for digest in sorted(apart)]
    lengths = [len(encoded.ids) for encoded in tokenizer.encode_batch(candidates)]
    validation = choose(candidates, lengths, arguments.validation_sequences, arguments.sequence_length)
    about = (
        f"- data: {len(texts):,} Python files ({sum(map(len, texts)) / 1e6:.1f} M characters) of the standard library "
        f"and {len(packages) - len(held) - 1} installed packages for training, {len(validation)} files out of "
        f"{', '.join(held)} for validation ({arguments.validation_sequences} sequences of "
        f"{arguments.sequence_length}), no file twice; BPE of {tokenizer.get_vocab_size():,} trained on "
        f"{len(sample):,} of the training files"
    )
    for name, part in (("train", texts), ("validation", validation)):
        file = out / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
        workers = str(arguments.workers) if name == "train" else "1"
        line = [
            sys.executable,
            "-m",
            PREPARE,
            "prepare",
            str(file),
            "--tokenizer",
            str((out / "tokenizer").resolve()),
            "--workers",
            workers,
            "--out",
            str(out / name),
        ]
        if subprocess.run(line, check=False).returncode:
            raise UserError(f"{file} could not be prepared")
        file.unlink()
        about += f"; {json.loads((out / name / 'meta.json').read_text())['tokens']:,} tokens for {name}"
    (out / "about.md").write_text(about + "\n", encoding="utf-8")
    return about


if __name__ == "__main__":
    raise SystemExit(main())
