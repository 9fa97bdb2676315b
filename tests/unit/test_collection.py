"""pytest finds every test: what it leaves out by the name of a folder it does not tell."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_folder_of_tests_is_left_out_by_its_name(pytestconfig):
    folders = {path.parent.relative_to(TESTS.parent) for path in TESTS.rglob("test_*.py")}
    assert Path("tests/dist") in folders
    names = {name for folder in folders for name in folder.parts}
    assert not [name for name in names for left_out in pytestconfig.getini("norecursedirs") if fnmatch(name, left_out)]
