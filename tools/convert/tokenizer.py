"""A run's tokenizer, saved for engines."""

from pathlib import Path
from typing import Any

from skv_dist.data.tokenizer import HuggingFaceTokenizer, load_tokenizer


def save_tokenizer(name: str, out: Path) -> dict[str, int | None]:
    """Save the tokenizer ``data.tokenizer`` into ``out``; its ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.

    Raises:
        UserError: it cannot be loaded any more.
    """
    loaded = load_tokenizer(name)
    tokenizer = loaded.stock if isinstance(loaded, HuggingFaceTokenizer) else _bytes_tokenizer()
    tokenizer.save_pretrained(out)
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


def _bytes_tokenizer() -> Any:
    """`ByteTokenizer` as a stock fast tokenizer: bytes without merges, ids shifted by three, no token added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(special)}
    vocabulary.update({char: byte + len(special) for byte, char in enumerate(_byte_characters())})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _byte_characters() -> list[str]:
    """The character by which byte-level BPE (GPT-2's) writes each byte: itself where it prints, else from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]
