"""Entry point for `torchrun train.py` from a checkout; the program is `gru4recf_dist.train`."""

import sys
from pathlib import Path

from gru4recf_dist import launcher, stopping

if __name__ == "__main__":
    # First of all: torch takes seconds to load, and a signal, or the launcher's end, must not be missed meanwhile.
    stopping.catch_signals()
    launcher.end_with_launcher()
    stopping.end_if_others_do_not_come()
    from gru4recf_dist.train import main

    sys.exit(main(default_config=Path(__file__).parent / "configs" / "default.yaml"))
