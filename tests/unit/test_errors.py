"""How a program ends on wrong input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gru4recf_dist.errors import UserError, exits_cleanly

PROGRAM = """
import sys
from gru4recf_dist.errors import UserError, exits_cleanly, report_from_every_rank

@exits_cleanly
def main(every_rank):
    if every_rank:
        report_from_every_rank()
    raise UserError("seed: must be 0 or more (got -1)")

sys.exit(main(sys.argv[1] == "every"))
"""


def _run(rank: str | None, mode: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    if rank is not None:
        environment["RANK"] = rank
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("rank", "mode", "speaks"),
    [(None, "first", True), ("0", "first", True), ("1", "first", False), ("1", "every", True), ("0", "every", True)],
)
def test_user_error_is_one_line_on_stderr_and_exit_code_2(rank, mode, speaks):
    done = _run(rank, mode)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: seed: must be 0 or more (got -1)\n" if speaks else "")


@pytest.fixture
def quiet_ranks(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_return_value_is_the_exit_code(quiet_ranks, returned, code):
    assert exits_cleanly(lambda: returned)() == code


def test_arguments_and_name_pass_through(quiet_ranks):
    @exits_cleanly
    def main(first, *, second):
        """Docstring."""
        return first + second

    assert main(1, second=2) == 3
    assert (main.__name__, main.__doc__) == ("main", "Docstring.")


def test_program_errors_keep_their_traceback(quiet_ranks):
    @exits_cleanly
    def main():
        raise ZeroDivisionError("our bug")

    with pytest.raises(ZeroDivisionError, match="our bug"):
        main()


def test_user_error_in_this_process_prints_its_text(quiet_ranks, capsys):
    @exits_cleanly
    def main():
        raise UserError("data: no such folder")

    assert main() == 2
    assert capsys.readouterr().err == "error: data: no such folder\n"
