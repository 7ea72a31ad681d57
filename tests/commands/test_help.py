"""Every command, and every action of one, shows an example in its --help, and the example can be read."""

import argparse
import re
import sys
from collections.abc import Callable

import pytest
from skv_tools.checkpoint import cli as checkpoint
from skv_tools.convert import cli as convert

from skv_dist.commands import evaluate, evaluate_harness, evaluate_questions, prepare_data, search_layers, train

PARSERS = {
    "skv-eval": evaluate._parser,
    "skv-eval questions": evaluate_questions._parser,
    "skv-eval harness": evaluate_harness._parser,
    "skv-eval search": search_layers._parser,
    "skv-data": prepare_data._parser,
    "skv-checkpoint": checkpoint._parser,
    "skv-convert": convert._parser,
}


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


@pytest.mark.parametrize("name", PARSERS)
def test_each_action_shows_an_example(name: str) -> None:
    parser = PARSERS[name]()
    for action, its in {"": parser, **actions(parser)}.items():
        assert f"example: {name} {action}".strip() in (its.epilog or ""), f"{name} {action} --help"


@pytest.mark.parametrize(
    ("main", "arguments", "name"),
    [(train.main, [], "skv-train"), (evaluate.main, ["compare"], "skv-eval compare")],
)
def test_commands_without_a_parser_of_their_own_do_too(
    main: Callable[[], int],
    arguments: list[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"example: {name} " in re.sub(r"\s+", " ", capsys.readouterr().out)
