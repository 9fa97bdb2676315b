"""How a rank's share of a large tensor passes through a checkpoint: in blocks of rows, never copied whole.

`torch.distributed.checkpoint` writes and reads a rank's share in one piece, of which it makes a copy. With these
planners it has many pieces instead, each an entry of its own in the same files and table of contents, so that any
number of ranks, and a plain `dcp.load`, can read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

BLOCK_BYTES = 8 << 20


class BlockSavePlanner(DefaultSavePlanner):
    """Writes every rank's rows in blocks of about `BLOCK_BYTES`."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self._shares = {item.index.fqn: item for item in plan.items if item.type == WriteItemType.SHARD}
        self.plan = dataclasses.replace(plan, items=[block for item in plan.items for block in _blocks(item)])
        return self.plan

    def transform_object(self, write_item: WriteItem, object):
        whole = super().transform_object(write_item, object)
        if write_item.type != WriteItemType.SHARD:
            return whole
        first = self._shares[write_item.index.fqn].tensor_data.chunk.offsets[0]
        block = write_item.tensor_data.chunk
        return whole.narrow(0, block.offsets[0] - first, block.sizes[0])


def _blocks(item: WriteItem) -> Iterator[WriteItem]:
    if item.type != WriteItemType.SHARD or not item.tensor_data.chunk.sizes.numel():
        yield item
        return
    chunk = item.tensor_data.chunk
    row_bytes = item.tensor_data.properties.dtype.itemsize * chunk.sizes[1:].numel()
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, chunk.sizes[0], rows):
        offsets = torch.Size([chunk.offsets[0] + start, *chunk.offsets[1:]])
        sizes = torch.Size([min(rows, chunk.sizes[0] - start), *chunk.sizes[1:]])
        block = dataclasses.replace(item.tensor_data, chunk=ChunkStorageMetadata(offsets, sizes))
        yield dataclasses.replace(item, index=MetadataIndex(item.index.fqn, offsets), tensor_data=block)


class RowsLoadPlanner(DefaultLoadPlanner):
    """Reads rows of saved tensors, which may be of another size, straight into their places.

    Args:
        first: by the name of each tensor to fill, which is a plain one, the saved row that its row 0 is. Rows that were
            not saved stay as they are.
    """

    def __init__(self, first: dict[str, int]) -> None:
        super().__init__()
        self._first = first

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, tensor in self.state_dict.items():
            saved = self.metadata.state_dict_metadata[name]
            rows = min(len(tensor), saved.size[0] - self._first[name])
            if rows > 0:
                offsets = torch.Size([self._first[name], *[0] * (tensor.dim() - 1)])
                wanted = ChunkStorageMetadata(offsets, torch.Size([rows, *tensor.shape[1:]]))
                items += create_read_items_for_chunk_list(name, saved, [wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]
