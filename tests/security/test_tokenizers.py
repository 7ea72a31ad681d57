"""A tokenizer folder of somebody else."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import transformers

from skv_dist.data.tokenizer import load_tokenizer
from skv_dist.errors import UserError


@pytest.fixture
def folder(words: Path, tmp_path: Path) -> Path:
    shutil.copytree(words, tmp_path / "given")
    return tmp_path / "given"


def change(folder: Path, **fields: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_its_code_is_not_run(folder: Path, words: Path, tmp_path: Path, place: str) -> None:
    made = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(made)!r}, 'w')\nclass Evil: pass\n")
    told = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    if place == "tokenizer_config.json":
        change(folder, tokenizer_class="Evil", auto_map=told)
    else:
        (folder / place).write_text(json.dumps({"model_type": "evil", "auto_map": told}))
    with contextlib.suppress(UserError):  # as some versions of transformers end
        assert load_tokenizer(str(folder)).fingerprint() == load_tokenizer(str(words)).fingerprint()
    assert not made.exists()


def test_we_never_allow_code(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    right = transformers.AutoTokenizer.from_pretrained

    def note(*arguments: object, **keywords: object) -> object:
        asked.append(keywords.get("trust_remote_code"))
        return right(*arguments, **keywords)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", note)
    load_tokenizer(str(words)).files()
    assert asked == [False, False]


@pytest.mark.parametrize("name", ["../../made", "/tmp/made", "..", ".hidden", "a/b", "a\nb", ""])
def test_its_templates_stay_in_their_folder(folder: Path, tmp_path: Path, name: str) -> None:
    """They are saved under their names, with every checkpoint."""
    (folder / "chat_template.jinja").unlink()
    change(folder, chat_template=[{"name": "default", "template": "x"}, {"name": name, "template": "y"}])
    with pytest.raises(UserError, match="has a chat template called"):
        load_tokenizer(str(folder)).files()
    assert not list(tmp_path.rglob("made*"))


def test_templates_with_plain_names_are_kept(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder, chat_template=[{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}])
    assert load_tokenizer(str(folder)).files()["additional_chat_templates/tool_use.jinja"] == b"y"


def test_a_template_reaches_nothing_of_the_machine(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "executed"
    reach = "''.__class__.__mro__[1].__subclasses__()"
    (folder / "chat_template.jinja").write_text(
        f"{{% for c in {reach} %}}{{% if c.__name__ == '_wrap_close' %}}"
        f"{{{{ c.__init__.__globals__['system']('touch {made}') }}}}{{% endif %}}{{% endfor %}}"
    )
    with pytest.raises(UserError, match="cannot render"):
        load_tokenizer(str(folder)).encode_chat([{"role": "user", "content": "w3"}])
    assert not made.exists()


def test_what_lies_outside_does_not_travel(folder: Path, tmp_path: Path) -> None:
    """A checkpoint takes along what the tokenizer saves, not the files of its folder."""
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", folder / "notes.json")
    change(folder, vocab_file="../secret", tokenizer_file="../secret")
    assert all(content.strip() != b"secret" for content in load_tokenizer(str(folder)).files().values())
