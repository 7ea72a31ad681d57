"""What a process says when it ends."""

import pytest

from skv_dist.parallel.processes.report import printable, report_error


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 日本 🙂 'a' \\n", "naïve 日本 🙂 'a' \\n"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31m\x00\u2028\u202e\ud800", "\\x1b[31m\\x00\\u2028\\u202e\\ud800"),
    ],
)
def test_a_name_cannot_make_a_line_of_its_own(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(text) == shown
    report_error(text)
    assert capsys.readouterr().err.endswith(f": error: {shown}\n")
