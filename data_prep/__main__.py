"""``python -m data_prep [--append] --config RECIPE.yaml [key=value ...]``"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from data_prep.prepare import prepare
from data_prep.recipe import Recipe
from gru4recf_dist import typed_yaml
from gru4recf_dist.errors import UserError, exits_cleanly


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare a data set; the report goes to stdout, progress to stderr."""
    parser = _Parser(prog="python -m data_prep", description="Raw event files -> session shards.", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="recipe, a path or fsspec URL (configs/data/*.yaml)")
    parser.add_argument(
        "--append",
        action="store_true",
        help="add the events to the data set that `output` holds: its items keep their ids, its sessions stay",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as source=data/raw/x")
    options = parser.parse_intermixed_args(arguments)
    recipe = typed_yaml.load(Recipe, options.config, options.overrides)
    started = time.monotonic()
    try:
        report = prepare(recipe, append=options.append)
    except OSError as error:
        # A disk that is full or a bucket that refuses is not a bug of this program.
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}") from error
    print(report.table())
    read = next(row["events"] for row in report.rows if row["step"] == "read")
    seconds = time.monotonic() - started
    print(f"\n{recipe.name}: {recipe.output} ({seconds:.1f} s, {read / seconds:,.0f} events/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
