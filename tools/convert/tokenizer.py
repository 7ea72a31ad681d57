"""A run's tokenizer, saved for engines."""

from pathlib import Path
from typing import Any

from skv_dist.data.tokenizer import HuggingFaceTokenizer, Tokenizer


def save_tokenizer(loaded: Tokenizer, out: Path) -> dict[str, int | None]:
    """Save a tokenizer into ``out``; its ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``."""
    tokenizer = loaded.stock if isinstance(loaded, HuggingFaceTokenizer) else _bytes_tokenizer()
    tokenizer.save_pretrained(out)
    return {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}


def _bytes_tokenizer() -> Any:
    """`ByteTokenizer` as a stock fast tokenizer: no merges, every character by its bytes, ids shifted by three."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
