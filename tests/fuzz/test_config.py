"""Configuration files and overrides: refused in one line that names the place, or read as they were meant."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from skv_dist.commands import train
from skv_dist.config.load import dump_config, load_config
from skv_dist.config.run import RunConfig, derive
from tests.fuzz.bounds import Caller, examples
from tests.support.settings import BASE

_TRAPS = [
    *("yes", "no", "on", "off", "~", "", "null", "y", "n", "True", "NULL", "010", "0o17", "0x1f", "0b11", "1:40"),
    *("1_000", "12e3", "1e3", "+5", "-0", ".5", "5.", ".inf", "-.inf", ".nan", "1e999", "-1", "9" * 5000, "1" * 400),
    *("2024-01-01", "1.0.0", "0777", "1,000", "=", "<<", "{}", "[]", "[[]]", "{a: b}", "*a", "&a 1", "!!int 5", "- 1"),
    *("!!python/object/apply:os.system [true]", "!!binary aGFsbG8=", "!!set {a}", "!!str 5", "!!int a", "!!float b"),
    *("!!map a", "!!bool 7", "!!null x", "!!timestamp x", "!!omap [a]", "|", ">-", "'", '"', "%", "@", "\t", "a: b"),
    *("a #b", "# a", '"\\e[31m"', '"\\n"', '"\\u202e"', '"\\0"', '"\\ud800"', "é", "\u2028", "\x07", "\ufeff"),
    *("[" * 1000, "{a: " * 700, "? [a]\n: b", "? {a: b}\n: c", "1e-4", "0.1", "3", "true", "byte", "auto", "never"),
]  # fmt: skip
_SCALARS = st.one_of(
    st.sampled_from(_TRAPS),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.text(max_size=8),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, 10**400]).map(str),
)


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        return found + [p for key, child in value.items() for p in _paths(child, (*path, key))]
    if isinstance(value, list):
        return found + [p for key, child in enumerate(value) for p in _paths(child, (*path, key))]
    return found


_FULL = RunConfig.model_validate(BASE).model_dump(mode="json")
_KEYS = _paths(_FULL)


class _Raw(str):
    """Stands in the file as it is."""


def _with(path: tuple[str | int, ...], value: Any, values: Any = BASE) -> Any:
    """A copy of ``values`` in which the key at ``path`` is ``value``; sections on the way are made."""
    values = copy.deepcopy(values)
    container = values
    for key in path[:-1]:
        if isinstance(container, dict) and not isinstance(container.get(key), dict | list):
            container[key] = {}
        container = container[key]
    container[path[-1]] = value
    return values


def _written(values: Any, indent: int = 0) -> str:
    """As YAML, one key a line; what is `_Raw` as it stands."""
    lines = []
    for key, value in values.items():
        head = f"{'  ' * indent}{key}:"
        if isinstance(value, dict) and value:
            lines.append(f"{head}\n{_written(value, indent + 1)}")
        elif isinstance(value, _Raw):
            lines.append(f"{head} {value}\n")
        else:
            lines.append(f"{head} {_flow(value)}\n")
    return "".join(lines)


def _flow(value: Any) -> str:
    if isinstance(value, _Raw):
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(child)}' for key, child in value.items())}}}"
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


_WHOLE = _written(BASE).encode()


@pytest.fixture
def configure(caller: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., RunConfig | None]:
    """``skv-train`` that trains nothing: the configuration it would train with, or None where it refused."""
    seen: list[RunConfig] = []

    def note(run: RunConfig) -> None:
        derive(run, 1)
        seen.append(run)

    monkeypatch.setattr(train, "train", note)
    file = tmp_path / "run.yaml"

    def run(content: bytes, *overrides: str, anywhere: bool = False) -> RunConfig | None:
        file.write_bytes(content)
        seen.clear()
        names = (
            () if anywhere else (file, "command line", "override", "model.", "train.", "data.", "parallel.", "usage")
        )
        outcome = caller.refused_or_right(train.main, file, *overrides, names=names)
        if outcome is None:
            return None
        (made,) = seen
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(made))
        assert load_config(again) == made  # what a checkpoint notes is what the run was
        return made

    return run


@examples(250)
@given(changes=st.lists(st.tuples(st.sampled_from(_KEYS), _SCALARS), min_size=1, max_size=3))
def test_wrong_values(configure: Callable[..., RunConfig | None], changes: Any) -> None:
    values: Any = BASE
    for path, text in changes:
        with contextlib.suppress(TypeError, KeyError, IndexError):  # in a list that an earlier change replaced
            values = _with(path, _Raw(text), values)
    configure(_written(values).encode("utf-8", errors="surrogatepass"))


@examples(150)
@given(
    path=st.sampled_from(_KEYS), text=_SCALARS, tail=st.sampled_from(["", "", "", ".0", ".x", ".", "..", ".-1", ".²"])
)
def test_overrides(configure: Callable[..., RunConfig | None], path: Any, text: str, tail: str) -> None:
    configure(_WHOLE, f"{'.'.join(map(str, path))}{tail}={text}")


@examples(120)
@given(position=st.integers(0, 10**6), what=st.binary(max_size=6), length=st.integers(0, 40))
def test_damaged_bytes(configure: Callable[..., RunConfig | None], position: int, what: bytes, length: int) -> None:
    position %= len(_WHOLE)
    configure(_WHOLE[:position] + what + _WHOLE[position + length :], anywhere=True)


_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@examples(120)
@given(path=st.sampled_from(_KEYS), tree=_TREES, unknown=st.none() | st.text(max_size=6))
def test_wrong_shapes(configure: Callable[..., RunConfig | None], path: Any, tree: Any, unknown: str | None) -> None:
    values = _with(path, tree)
    if unknown is not None:
        values[unknown] = tree
    configure(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", errors="surrogatepass"), anywhere=True)


_INTEGERS = ["{}", "{}.0", "+{}", "{:_}", "0{}", "00{}", "{}e0", "{:#x}", "{:#o}", "'{}'"]


@examples(60)
@given(number=st.integers(1, 10**6), form=st.sampled_from(_INTEGERS), as_override=st.booleans())
def test_an_integer_is_what_it_says(
    configure: Callable[..., RunConfig | None], number: int, form: str, as_override: bool
) -> None:
    text = form.format(number)
    if as_override:
        made = configure(_WHOLE, f"train.steps={text}")
    else:
        made = configure(_written(_with(("train", "steps"), _Raw(text))).encode())
    assert made is not None
    assert made.train.steps == number


@examples(40)
@given(number=st.floats(1e-12, 10, exclude_min=True), form=st.sampled_from(["{!r}", "{:e}", "{:.9E}", "'{!r}'"]))
def test_a_number_is_what_it_says(configure: Callable[..., RunConfig | None], number: float, form: str) -> None:
    text = form.format(number)
    made = configure(_written(_with(("optimizer", "lr"), _Raw(text))).encode())
    assert made is not None
    assert made.optimizer.lr == float(text.strip("'"))


@pytest.mark.parametrize(
    "text", ["010", "1_000", "12:30", "0b11", "yes", "no", "on", "off", "y", "2024-01-01", "1.0.0", "="]
)
def test_text_is_what_it_says(configure: Callable[..., RunConfig | None], text: str) -> None:
    """To YAML 1.1 each of them is something else."""
    for made in (
        configure(_written(_with(("train", "output_dir"), _Raw(text))).encode()),
        configure(_WHOLE, f"train.output_dir={text}"),
    ):
        assert made is not None
        assert made.train.output_dir == text


@pytest.mark.parametrize("text", ["1e3", "0x10", "0o17", "15", "-3", ".5", "true", "~"])
def test_what_is_no_text_is_refused_for_one(configure: Callable[..., RunConfig | None], text: str) -> None:
    assert configure(_written(_with(("train", "output_dir"), _Raw(text))).encode()) is None
    made = configure(_written(_with(("train", "output_dir"), _Raw(f"'{text}'"))).encode())
    assert made is not None
    assert made.train.output_dir == text


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("no", False), ("on", True), ("off", False), ("true", True), ("False", False)]
)
def test_switches(configure: Callable[..., RunConfig | None], text: str, value: bool) -> None:
    made = configure(_written(_with(("train", "tensorboard"), _Raw(text))).encode())
    assert made is not None
    assert made.train.tensorboard is value


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "a: &a {b: *a}", "\n".join(["a: &a [x, x]", *(f"{c}: &{c} [{'*a, ' * 9}*a]" for c in "b")])]
)
def test_aliases_end(configure: Callable[..., RunConfig | None], text: str) -> None:
    configure(text.encode(), anywhere=True)


def test_aliases_do_not_multiply(configure: Callable[..., RunConfig | None]) -> None:
    names = "abcdefghij"
    lines = [
        "a: &a [x, x]",
        *(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in zip(names, names[1:])),
    ]
    assert configure("\n".join(lines).encode(), anywhere=True) is None


@pytest.mark.parametrize(
    "base", ["5", "null", "{a: b}", "[1]", "['']", "''", '"\\0"', '"\\ud800"', "nowhere.yaml", ".", "run.yaml"]
)
def test_a_base_that_is_none(configure: Callable[..., RunConfig | None], base: str) -> None:
    assert configure(f"base: {base}\n".encode() + _WHOLE, anywhere=True) is None
