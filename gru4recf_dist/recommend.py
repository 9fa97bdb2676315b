"""Recommend next items: `torchrun ... -m gru4recf_dist.recommend --run RUN_DIR --input IN --output OUT -k 20`.

IN holds a JSON object a line, `{"items": ["token", ...]}`, with any other keys; OUT gets, in the same order, the same
keys with `items` replaced by the recommended tokens, best first, and `scores` beside them. Both may be fsspec URLs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gru4recf_dist import trained_run
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.data.batches import pack_histories
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.shard_format import PADDING_ID
from gru4recf_dist.data.tokens import read_item_tokens
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.evaluation.topk import top_k
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.recommender import Recommender


@dataclass
class _Counts:
    """What the summary line reports."""

    sessions: int = 0
    unknown_tokens: int = 0
    empty_sessions: int = 0


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Read sessions, write recommendations; unknown tokens are ignored and counted."""
    arguments = _parse(argv)
    if arguments.k < 1:
        raise UserError(f"-k: must be at least 1, not {arguments.k}")
    config = trained_run.read_config(arguments.run, arguments.overrides)
    with process_ranks.running(config.device, config.timeout_seconds) as ranks:
        model, manifest = trained_run.load_model(config, ranks)
        tokens = read_item_tokens(config.data, manifest)
        ids = {token: number for number, token in enumerate(tokens) if number != PADDING_ID}
        counts = _Counts()
        with storage.open_read(arguments.input) as source, contextlib.ExitStack() as stack:
            target = stack.enter_context(storage.open_atomic(arguments.output)) if ranks.is_first else None
            lines = _read_lines(source, arguments.input)
            # One batch a rank and round: the ranks encode different sessions and search for all of them together.
            while chunk := list(itertools.islice(lines, config.evaluation.batch_sessions * ranks.world)):
                histories = [_to_ids(line["items"], ids, counts) for line in chunk]
                found, scores = _recommend(config, model, ranks, histories, arguments.k, arguments.exclude_seen)
                if target is not None:
                    for line, items, values in zip(chunk, found.tolist(), scores.tolist(), strict=True):
                        real = [(tokens[i], value) for i, value in zip(items, values, strict=True) if i != PADDING_ID]
                        line.update(items=[token for token, _ in real], scores=[value for _, value in real])
                        target.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if ranks.is_first:
            print(
                f"{counts.sessions} sessions, {counts.unknown_tokens} unknown tokens ignored, "
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


def _read_lines(source, url: str) -> Iterator[dict]:
    for number, text in enumerate(source, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{url}:{number}: not a JSON object ({error})") from error
        if not isinstance(line, dict) or not isinstance(line.get("items"), list):
            raise UserError(f"{url}:{number}: must be an object with a list called 'items'")
        yield line


def _to_ids(tokens: list, ids: dict[str, int], counts: _Counts) -> np.ndarray:
    """Item ids of a session's known tokens; tokens may be given as numbers too."""
    known = [ids[token] for token in map(str, tokens) if token in ids]
    counts.sessions += 1
    counts.unknown_tokens += len(tokens) - len(known)
    counts.empty_sessions += not known
    return np.array(known, np.int32)


def _recommend(
    config: Config, model: Recommender, ranks: Ranks, histories: list[np.ndarray], k: int, exclude_seen: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best items of each history, int64 [n, k], and their scores [n, k]; padding for empty histories."""
    # An empty history is encoded as one padding event and its result thrown away.
    events = [history if len(history) else np.array([PADDING_ID], np.int32) for history in histories]
    # Fixed batches, each encoded whole by one rank: scores are the same to the last digit for any number of ranks.
    size = config.evaluation.batch_sessions
    shares = [range(len(events))[rank * size : (rank + 1) * size] for rank in range(ranks.world)]
    mine = shares[ranks.rank]
    own = [events[i] for i in mine] or [np.array([PADDING_ID], np.int32)]
    block = Block(
        items=np.concatenate(own),
        lengths=np.array([len(history) for history in own], np.int32),
        sessions=np.arange(len(own), dtype=np.int64),
    )
    batch = pack_histories(block, config.loader.max_length)
    encoded = model.encode(batch.items, batch.batch_sizes)
    queries = encoded[batch.positions.to(ranks.device)][: len(mine)]
    queries = collectives.all_gather_rows(queries, [len(share) for share in shares], ranks.table)
    seen_query = seen_item = None
    if exclude_seen:
        lengths = torch.tensor([len(history) for history in histories])
        seen_query = torch.repeat_interleave(torch.arange(len(histories)), lengths).to(ranks.device)
        seen_item = torch.from_numpy(np.concatenate(histories).astype(np.int64)).to(ranks.device)
    found, scores = top_k(
        queries, k, model.table, config.model.score, config.evaluation.tile_rows, seen_query, seen_item
    )
    empty = torch.tensor([not len(history) for history in histories], device=found.device)
    return found.masked_fill(empty[:, None], PADDING_ID), scores


if __name__ == "__main__":
    sys.exit(main())
