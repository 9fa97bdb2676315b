"""Distributed training of GRU4RecF over sharded item tables and streamed session shards."""

import os

__version__ = "0.1.0"

# Read when torch is loaded. Every rank would otherwise print a C++ warning that DDP finds no unused parameters: it is
# asked to look for them for another reason (see `parallel.engines`).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
