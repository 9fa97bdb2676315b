#!/usr/bin/env bash
# One node's part of a training run. Start it on every node with the same NNODES and RDZV_ENDPOINT:
#
#   NNODES=2 RDZV_ENDPOINT=host0:29500 launch/torchrun_node.sh --config configs/x.yaml key=value
#
# NNODES          number of nodes (1), or the least and the most, MIN:MAX: ranks start anew as nodes go and come
# RDZV_ENDPOINT   HOST:PORT where the nodes meet, HOST being one of them; may be left out with one node
# RDZV_ID         name of the meeting (gru4recf); differs between runs that share an endpoint
# RDZV_CONF       further settings of the meeting, such as last_call_timeout=5,keep_alive_interval=1
# NODE_RANK       fixes this node's place in the order of the ranks, 0 being RDZV_ENDPOINT's host (any order)
# NPROC_PER_NODE  ranks on this node (its number of GPUs, or 1)
# MAX_RESTARTS    how often torchrun may start all ranks anew after one has died (0)
# VENV            virtual environment (.venv); empty: the python on PATH
# CHECK           no: skip the check of the configuration; only: do nothing else
# MODULE          run this module instead of train.py, without a check, such as gru4recf_dist.evaluate
#
# The arguments are the program's; paths in them are relative to the folder of train.py. Exits 2 on a configuration error.
# SIGTERM or SIGUSR1 to this script stops training at a checkpoint, on all nodes, with status 0; a second one at once.
# With MODULE, SIGTERM ends everything, and SIGUSR1 does nothing.
set -euo pipefail

# What comes before the launcher is noted: the other nodes' ranks would wait for those of this one, and all of them stop
# together, at once. The programs that are run until then do not get it. Only in the moment in which the launcher's Python
# starts, and cannot take signals yet, does one end it, and so this script.
wished=
if [[ -z ${MODULE:-} ]]; then
  trap 'wished=yes' TERM USR1
else
  # There is nothing to stop at. What ignores a signal hands that down: torchrun would die of it while its ranks run on.
  trap '' USR1
fi
undisturbed() {
  (
    trap '' TERM USR1
    exec "$@"
  )
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

nnodes=${NNODES:-1}
if [[ -z ${RDZV_ENDPOINT:-} ]]; then
  [[ $nnodes == 1 ]] || fail "RDZV_ENDPOINT must be given (HOST:PORT) when NNODES is $nnodes"
  RDZV_ENDPOINT=127.0.0.1:0
fi
[[ $RDZV_ENDPOINT == ?*:?* ]] || fail "RDZV_ENDPOINT: must be HOST:PORT (got '$RDZV_ENDPOINT')"

if [[ -n ${MODULE:-} ]]; then
  program=(-m "$MODULE")
  stoppable=()
else
  program=(train.py)
  # torchrun itself would kill the ranks 30 s after SIGTERM, and die of SIGUSR1 while they run on.
  stoppable=(python launch/stoppable.py)
  # Under torchrun a worker's exit status is lost and its one line of error is followed by pages, hence a check before.
  if [[ ${CHECK:-} != no ]]; then
    undisturbed python train.py --check "$@"
  fi
fi
if [[ ${CHECK:-} == only ]]; then
  exit
fi

nproc=${NPROC_PER_NODE:-$(undisturbed python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
rendezvous=(--rdzv-backend=c10d)
if [[ -n ${NODE_RANK:-} ]]; then
  # The c10d rendezvous orders nodes as it likes; only the static one takes a rank.
  rendezvous=(--rdzv-backend=static --node-rank="$NODE_RANK")
fi
if [[ -n ${RDZV_CONF:-} ]]; then
  rendezvous+=(--rdzv-conf="$RDZV_CONF")
fi

# Ranks of one node share its cores; more than one thread each must be asked for.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# With a shared store, ranks that torchrun starts anew find the addresses of the dead ones in it, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
if [[ -n $wished ]]; then
  export GRU4RECF_STOP_WISHED=yes
fi
exec "${stoppable[@]}" torchrun --nnodes="$nnodes" --nproc-per-node="$nproc" --max-restarts="${MAX_RESTARTS:-0}" \
  "${rendezvous[@]}" --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="${RDZV_ID:-gru4recf}" "${program[@]}" "$@"
