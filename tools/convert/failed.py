"""Folders that were written and then not found to be right: kept beside, never under the name that was asked for."""

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from skv_dist.errors import UserError

from .findings import Finding, first_problem, table

REPORT = "FAILED.md"


def check_or_keep(folder: Path, out: Path, findings: Sequence[Finding], compare: str) -> None:
    """Return if all findings are good.

    Args:
        folder: what was written, to be called ``out``.
        compare: the command that compares once more; ``{}`` stands for the folder.

    Raises:
        UserError: they are not; ``folder`` has moved to ``OUT.failed``, with the figures.
    """
    problem = first_problem(findings)
    if problem is not None:
        raise keep(folder, out, f"it is not what it was made from: {problem}", findings, compare)


def keep(folder: Path, out: Path, why: str, findings: Sequence[Finding], compare: str) -> UserError:
    """Move ``folder`` to ``OUT.failed``, or the next free name, with a report; the error that says so.

    Args:
        why: in one clause.
    """
    kept = _free_name(out)
    command = compare.format(kept)
    lines = [f"# {out.name} was not written: {why}", "", *([table(findings)] if findings else []), ""]
    lines += [
        "`limit` is the largest difference that is taken for rounding; a wrong map, norm or position gives one near "
        "the column `under a wrong map`. This folder is complete, but do not serve it before you know why it differs.",
        "",
        f"- To compare once more, after a change of software, disk or memory: `{command}`",
        "- Full disks, too little memory and other versions of transformers are the likely causes outside of skv-dist.",
        "- Where the difference is known and accepted, `--no-verify` writes the folder under its name.",
    ]
    (folder / REPORT).write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(folder, kept)
    return UserError(f"{out} was not written: {why}; what there is is kept in {kept}, whose {REPORT} says how to go on")


def _free_name(out: Path) -> Path:
    names = (out.with_name(f"{out.name}.failed{'' if number == 1 else f'.{number}'}") for number in count(1))
    return next(name for name in names if not name.exists())
