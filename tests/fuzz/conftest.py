"""What the fuzz tests share."""

import pytest

from tests.fuzz.bounds import Caller


@pytest.fixture
def caller(capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(capsys)
