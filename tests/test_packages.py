"""What a wheel holds: `pyproject.toml` lists packages by name, as the folder of one is called otherwise."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join((package, *file.parent.relative_to(ROOT / folder).parts))
        for package, folder in (("skv_dist", "skv_dist"), ("skv_tools", "tools"))
        for file in (ROOT / folder).rglob("*.py")
    }
    assert sorted(listed) == sorted(there)
