"""Recommend next items: `torchrun ... -m gru4recf_dist.recommend --run RUN_DIR --input IN --output OUT -k 20`.

IN holds a JSON object a line, `{"items": ["token", ...]}`, with any other keys; OUT gets, in the same order, the same
keys with `items` replaced by the recommended tokens, best first, and `scores` beside them. Both may be fsspec URLs.
Event features of the session's events, if the model takes any, are lists of the same length: `"events": {"NAME":
[value, ...]}`, and `"times": [...]` for time gaps. What is not given counts as missing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys

import numpy as np
import torch

from gru4recf_dist import trained_run
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.data.batches import pack_histories
from gru4recf_dist.data.shard_format import PADDING_ID
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.evaluation.topk import top_k
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.node_arrays import NodeArrays
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.recommend_input import Session, SessionReader, to_block
from gru4recf_dist.recommender import Recommender


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Read sessions, write recommendations; unknown tokens are ignored and counted."""
    arguments = _parse(argv)
    if arguments.k < 1:
        raise UserError(f"-k: must be at least 1, not {arguments.k}")
    config = trained_run.read_config(arguments.run, arguments.overrides)
    with process_ranks.running(config.device, config.timeout_seconds) as ranks:
        model, manifest = trained_run.load_model(config, ranks)
        reader = SessionReader(config.data, manifest, model.event_features, NodeArrays(ranks))
        with storage.open_read(arguments.input) as source, contextlib.ExitStack() as stack:
            target = stack.enter_context(storage.open_atomic(arguments.output)) if ranks.is_first else None
            sessions = reader.read(source, arguments.input)
            # One batch a rank and round: the ranks encode different sessions and search for all of them together.
            while chunk := list(itertools.islice(sessions, config.evaluation.batch_sessions * ranks.world)):
                found, scores = _recommend(config, model, ranks, reader, chunk, arguments.k, arguments.exclude_seen)
                if target is not None:
                    for session, items, values in zip(chunk, found.cpu().numpy(), scores.tolist(), strict=True):
                        real = items != PADDING_ID
                        tokens = reader.index.tokens(items[real])
                        line = session.line
                        line.update(items=tokens, scores=list(itertools.compress(values, real)))
                        target.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if ranks.is_first:
            counts = reader.counts
            of_events = f"{counts.unknown_values} unknown values of events, " if model.event_features else ""
            print(
                f"{counts.sessions} sessions, {counts.unknown_tokens} unknown tokens ignored, {of_events}"
                f"{counts.empty_sessions} sessions without a known item (no recommendation): {arguments.output}",
                file=sys.stderr,
            )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gru4recf_dist.recommend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trained_run.add_run_argument(parser)
    parser.add_argument("--input", required=True, help="JSON lines, path or URL")
    parser.add_argument("--output", required=True, help="JSON lines, path or URL")
    parser.add_argument("-k", type=int, default=20, help="items a session (default 20)")
    parser.add_argument("--exclude-seen", action="store_true", help="never recommend an item of the session itself")
    process_ranks.add_launcher_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.batch_sessions=1024")
    return parser.parse_intermixed_args(argv)


def _recommend(
    config: Config,
    model: Recommender,
    ranks: Ranks,
    reader: SessionReader,
    sessions: list[Session],
    k: int,
    exclude_seen: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best items of each session, int64 [n, k], and their scores [n, k]; padding for empty ones."""
    # An empty session is encoded as one padding event and its result thrown away.
    events = [session if len(session.items) else reader.padding() for session in sessions]
    # Fixed batches, each encoded whole by one rank: scores are the same to the last digit for any number of ranks.
    size = config.evaluation.batch_sessions
    shares = [range(len(events))[rank * size : (rank + 1) * size] for rank in range(ranks.world)]
    mine = shares[ranks.rank]
    own = [events[i] for i in mine] or [reader.padding()]
    batch = pack_histories(to_block(own), config.loader.max_length, model.event_features)
    encoded = model.encode(batch.items, batch.batch_sizes, batch.event_features)
    queries = encoded[batch.positions.to(ranks.device)][: len(mine)]
    queries = collectives.all_gather_rows(queries, [len(share) for share in shares], ranks.table)
    seen_query = seen_item = None
    if exclude_seen:
        lengths = torch.tensor([len(session.items) for session in sessions])
        seen_query = torch.repeat_interleave(torch.arange(len(sessions)), lengths).to(ranks.device)
        seen = np.concatenate([session.items for session in sessions])
        seen_item = torch.from_numpy(seen.astype(np.int64)).to(ranks.device)
    found, scores = top_k(queries, k, model.candidates, config.evaluation.tile_rows, seen_query, seen_item)
    empty = torch.tensor([not len(session.items) for session in sessions], device=found.device)
    return found.masked_fill(empty[:, None], PADDING_ID), scores


if __name__ == "__main__":
    sys.exit(main())
