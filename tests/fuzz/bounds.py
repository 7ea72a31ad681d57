"""A command under bounds: whatever its input, it ends soon, in one line or rightly, and within some memory."""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings

# So many times as many examples as in the suite, other ones in each run (tests/long/test_fuzz.py).
FACTOR = int(os.environ.get("SKV_FUZZ", "1"))
_SECONDS = 60  # for one example; generous, as nothing here takes one
_BYTES = 4 * 2**30  # of addresses that one example may take


def examples(number: int) -> Any:
    """Settings for so many examples in the suite: always the same ones there."""
    return settings(
        max_examples=number * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        # Making what fails smaller would take minutes, and it is small: one damaged file.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """An example took too long. No `Exception`, so that nothing takes it for an error of the input."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Time and memory of one example."""

    def stop(*_: object) -> None:
        raise HangError(f"still busy after {_SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


class Outcome(NamedTuple):
    code: int
    out: str
    error: str


class Caller:
    """Calls a command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, main: Callable[[], int], *arguments: object) -> Outcome:
        """Its exit code and what it wrote. Whatever it raises is a defect: a user would see a traceback."""
        self._capsys.readouterr()
        before = sys.argv
        sys.argv = ["skv-command", *map(str, arguments)]
        try:
            with bounded():
                code = main()
        except SystemExit as ended:  # argparse
            code = ended.code if isinstance(ended.code, int) else 1
        finally:
            sys.argv = before
        written = self._capsys.readouterr()
        return Outcome(code, written.out, written.err)

    def refused_or_right(
        self, main: Callable[[], int], *arguments: object, names: Sequence[object] = ()
    ) -> Outcome | None:
        """None where the command refused in one line that holds one of ``names``; else what it gave, code 0."""
        outcome = self(main, *arguments)
        if outcome.code == 0:
            return outcome
        assert outcome.code == 2, outcome
        assert_one_line(outcome.error)
        assert not names or any(str(name) in outcome.error for name in names), outcome.error
        return None


def assert_one_line(error: str) -> None:
    """What a refusal is: one line without control characters that says something."""
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert ": error: " in lines[0], error
    assert lines[0].isprintable(), repr(error)
    assert len(lines[0]) < 4100, len(lines[0])
    assert not lines[0].rstrip().endswith(("error:", "None", "()")), error
