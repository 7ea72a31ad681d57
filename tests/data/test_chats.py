"""Chats through a tokenizer's own template: which tokens are answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from skv_dist.config.data import DataConfig, SourceConfig
from skv_dist.data.batches import collate
from skv_dist.data.open import open_data
from skv_dist.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from skv_dist.errors import UserError

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Thoughts of all turns but the last are taken out, as some templates do.
FORGETFUL = CHATML.replace(
    "{{ m['content'] }}<|im_end|>{% else", "{{ m['content'] if loop.last else '' }}<|im_end|>{% else"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + CHATML
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who is he?"},
    {"role": "assistant", "content": "Ted."},
    {"role": "tool", "content": "42"},
    {"role": "user", "content": "And she?"},
    {"role": "assistant", "content": "Ann."},
]


def tokenizer_in(folder: Path, template: str | None) -> HuggingFaceTokenizer:
    """Bytes, and the marks of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = template
    made.save_pretrained(folder)
    loaded = load_tokenizer(str(folder))
    assert isinstance(loaded, HuggingFaceTokenizer)
    return loaded


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_what_assistants_say_is_the_answer(tmp_path: Path, template: str) -> None:
    tokenizer = tokenizer_in(tmp_path, template)
    ids, answer = tokenizer.encode_chat(CHAT)
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    assert tokenizer.stock.decode(ids) == whole
    # With the token that ends the turn; the line break that some templates write behind it does no harm.
    assert tokenizer.stock.decode(ids[answer]).replace("\n", "") == "Ted.<|im_end|>Ann.<|im_end|>"


def test_a_template_that_forgets_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, FORGETFUL)
    with pytest.raises(UserError, match="renders message 3 otherwise once more follows"):
        tokenizer.encode_chat(CHAT)
    ids, answer = tokenizer.encode_chat(CHAT[:3])
    assert tokenizer.stock.decode(ids[answer]).strip() == "Ted.<|im_end|>"


def rows(folder: Path, *chats: Any) -> SourceConfig:
    (folder / "chats.jsonl").write_text("".join(json.dumps({"m": chat}) + "\n" for chat in chats))
    return SourceConfig(path=str(folder / "chats.jsonl"), format="jsonl", messages_field="m")


def opened(folder: Path, tokenizer: HuggingFaceTokenizer, *chats: Any) -> Any:
    config = DataConfig(
        sources=[rows(folder, *chats)],
        sequence_length=160,
        reset_attention=True,
        validation_fraction=0,
        cache_dir=str(folder / "cache"),
    )
    return open_data(config, tokenizer, 0, lambda: None)[0]


def test_a_run_learns_the_answers_of_chats(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path / "tokenizer", CHATML)
    train = opened(tmp_path, tokenizer, CHAT, CHAT[:3])
    batch = collate(0, [train[0]], reset_attention=True)  # both in one sequence
    counted = tokenizer.stock.decode(batch.labels[batch.loss_mask.bool()]).replace("\n", "")
    assert sorted(counted.split("<|im_end|>")) == ["", "Ann.", "Ted.", "Ted."]


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (None, CHAT, r"chats.jsonl' row 1: data.tokenizer .* has no chat template"),
        (STRICT, CHAT, r"chats.jsonl' row 1: the chat template .* cannot render these messages: no system, please"),
        (CHATML, "hello", r"chats.jsonl': row 1: field 'm' is no list of messages with role and content"),
        (CHATML, [{"content": "hello"}], r"chats.jsonl': row 1: field 'm' is no list of messages"),
        (CHATML, CHAT[:2], r"chats.jsonl' holds no text: 1 of 1 documents skipped: 1 chats without an answer"),
    ],
)
def test_bad_chats_are_refused_by_row(tmp_path: Path, template: str | None, chat: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path, tokenizer_in(tmp_path / "tokenizer", template), chat)
