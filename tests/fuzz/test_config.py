"""Configuration files and overrides: refused in one line that names the place, or read as they were meant."""

import copy
import math
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
    *("!!python/object/apply:os.system [true]", "!!binary aGFsbG8=", "!!set {a}", "!!str 5", "|", ">-", "'", '"', "%", "@"),
    *("\t", "a: b", "a #b", "# a", '"\\e[31m"', '"\\n"', '"\\u202e"', '"\\0"', "é", "\u2028", "\x07", "\ufeff", "\U0001f600"),
    *("[" * 3000, "{a: " * 2000, "? [a]\n: b", "? {a: b}\n: c", "1e-4", "0.1", "3", "true", "byte", "auto", "never"),
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


_KEYS = [path for path in _paths(RunConfig.model_validate(BASE).model_dump(mode="json")) if path[0] != "base"]
_FULL = RunConfig.model_validate(BASE).model_dump(mode="json")


class _Raw(str):
    """Stands in the file as it is."""


def _set(values: Any, path: tuple[str | int, ...], value: Any) -> None:
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value


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
            lines.append(
                f"{head} {yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix('...' + chr(10)).strip()}\n"
            )
    return "".join(lines)


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
    values = copy.deepcopy(_FULL)
    for path, text in changes:
        try:
            _set(values, path, _Raw(text))
        except (TypeError, KeyError, IndexError, AttributeError):  # a section that an earlier change replaced
            continue
    configure(_written(values).encode("utf-8", errors="surrogatepass"))


@examples(150)
@given(path=st.sampled_from(_KEYS), text=_SCALARS, tail=st.sampled_from(["", ".0", ".x", ".", "..", ".-1", ".é"]))
def test_overrides(configure: Callable[..., RunConfig | None], path: Any, text: str, tail: str) -> None:
    configure(_written(_FULL).encode(), f"{'.'.join(map(str, path))}{tail}={text}")


@examples(120)
@given(position=st.integers(0, 10**6), what=st.binary(max_size=6), length=st.integers(0, 40))
def test_damaged_bytes(configure: Callable[..., RunConfig | None], position: int, what: bytes, length: int) -> None:
    whole = _written(_FULL).encode()
    position %= len(whole)
    configure(whole[:position] + what + whole[position + length :], anywhere=True)


_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@examples(120)
@given(path=st.sampled_from(_KEYS), tree=_TREES, unknown=st.none() | st.text(max_size=6))
def test_wrong_shapes(configure: Callable[..., RunConfig | None], path: Any, tree: Any, unknown: str | None) -> None:
    values = copy.deepcopy(_FULL)
    _set(values, path, tree)
    if unknown is not None:
        values[unknown] = tree
    configure(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", errors="surrogatepass"), anywhere=True)


@examples(60)
@given(
    number=st.integers(1, 10**6), form=st.sampled_from(["{}", "{}.0", "+{}", "{:_}", "{}e0", "{:#x}", "{:#o}", "'{}'"])
)
def test_an_integer_is_what_it_says(configure: Callable[..., RunConfig | None], number: int, form: str) -> None:
    values = copy.deepcopy(_FULL)
    values["train"]["steps"] = _Raw(form.format(number))
    made = configure(_written(values).encode())
    assert made is not None
    assert made.train.steps == number


@examples(40)
@given(number=st.floats(1e-12, 10, exclude_min=True), form=st.sampled_from(["{!r}", "{:e}", "{:.9E}", "'{!r}'"]))
def test_a_number_is_what_it_says(configure: Callable[..., RunConfig | None], number: float, form: str) -> None:
    values = copy.deepcopy(_FULL)
    values["optimizer"]["lr"] = _Raw(form.format(number))
    made = configure(_written(values).encode())
    assert made is not None
    assert math.isclose(made.optimizer.lr, float(form.format(number).strip("'")), rel_tol=0)
