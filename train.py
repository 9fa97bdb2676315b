"""Entry point for `torchrun train.py` from a checkout; the program is `gru4recf_dist.train`."""

import sys
from pathlib import Path

from gru4recf_dist.train import main

if __name__ == "__main__":
    sys.exit(main(default_config=Path(__file__).parent / "configs" / "default.yaml"))
