"""TorchRec's row-wise sharded embedding as a contender of `benchmarks.torchrec`; needs TorchRec's environment."""

from __future__ import annotations

import numpy as np
import torch
import torchrec
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from gru4recf_dist.table.item_table import ShardedItemTable

_TABLE, _FEATURE = "item_table", "item"


class TorchrecTable:
    """An `EmbeddingCollection` of one table, sharded by rows, row-wise Adagrad fused into the backward.

    Args:
        like: whose rows it starts with, and whose optimizer's settings it takes.
        deduplicate: whether it is asked for distinct ids only. (TorchRec's own `use_index_dedup` needs a GPU.)
    """

    def __init__(self, like: ShardedItemTable, deduplicate: bool) -> None:
        config = torchrec.EmbeddingConfig(
            name=_TABLE, embedding_dim=like.dim, num_embeddings=like.rows, feature_names=[_FEATURE]
        )
        collection = torchrec.EmbeddingCollection(tables=[config], device=torch.device("meta"))
        adagrad = {"lr": like.config.lr, "eps": like.config.eps}
        apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, collection.parameters(), adagrad)
        sharder, world = EmbeddingCollectionSharder(), like.ranks.world
        plan = construct_module_sharding_plan(
            collection,
            {_TABLE: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value)},
            sharder=sharder,
            local_size=world,
            world_size=world,
            device_type="cpu",
        )
        environment = ShardingEnv.from_process_group(like.ranks.table)
        self._module: nn.Module = sharder.shard(collection, plan, environment, device=torch.device("cpu"))
        (self.weight,) = (
            shard.tensor for value in self._module.state_dict().values() for shard in value.local_shards()
        )
        self.weight.copy_(like.weight)
        self._deduplicate = deduplicate

    def prepare(self, ids: torch.Tensor) -> torch.Tensor | torchrec.KeyedJaggedTensor:
        """What `step` takes: made ahead, unless the ids have yet to be de-duplicated."""
        return ids if self._deduplicate else _bags(ids)

    def step(self, ids: torch.Tensor | torchrec.KeyedJaggedTensor, gradient: torch.Tensor) -> None:
        """Look up, and update by the gradient [n, D] of what was looked up."""
        if not self._deduplicate:
            self._module(ids)[_FEATURE].values().backward(gradient)
            return
        distinct, places = np.unique(ids.numpy(), return_inverse=True)
        rows = self._module(_bags(torch.from_numpy(distinct)))[_FEATURE].values()
        rows[torch.from_numpy(places)].backward(gradient)


def _bags(ids: torch.Tensor) -> torchrec.KeyedJaggedTensor:
    """Sessions of one id each: as plain as its input can be."""
    lengths = torch.ones(len(ids), dtype=torch.int64)
    return torchrec.KeyedJaggedTensor(keys=[_FEATURE], values=ids, lengths=lengths)
