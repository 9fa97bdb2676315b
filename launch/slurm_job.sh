# shellcheck shell=bash
# Sourced by the SLURM jobs beside it, in the folder of train.py: one torchrun a node, and the way back into the queue.

# shellcheck source=launch/environment.sh
. launch/environment.sh

log_dir=${LOG_DIR:-runs/slurm}
attempt=${SLURM_RESTART_COUNT:-0}
# shellcheck disable=SC2034 # read by the jobs
signalled=
# This shell must outlive srun to put the job back into the queue. Bash runs the trap when srun has ended, soon enough.
trap 'signalled=yes' TERM USR1

# run_on_nodes ARGUMENTS: launch/torchrun_node.sh with them on every node; returns the status of the worst.
run_on_nodes() {
  mkdir -p "$log_dir"
  head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export NNODES=$SLURM_JOB_NUM_NODES
  export RDZV_ENDPOINT=$head_node:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  # With the attempt in it, what is left of an earlier attempt cannot join this one.
  export RDZV_ID=$SLURM_JOB_ID-$attempt
  echo "attempt $attempt on $SLURM_JOB_NODELIST, logs in $log_dir/$SLURM_JOB_ID-*.log"
  # cpu-bind: SLURM may otherwise bind the one task of a node, and so all its ranks, to a single core.
  srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --cpu-bind=none \
    --kill-on-bad-exit=1 --open-mode=append --output="$log_dir/%j-%N.log" launch/torchrun_node.sh "$@"
}

# a_node_is_lost: whether one of the job's nodes does not answer. SLURM finds that out only after its SlurmdTimeout; ranks
# whose connections broke have failed long before, and would take the job with them.
a_node_is_lost() {
  ! timeout "${NODE_TIMEOUT:-60}" srun --overlap --ntasks-per-node=1 --cpu-bind=none true >/dev/null 2>&1
}

# requeue REASON: puts the job back into the queue, unless SLURM has decided about it already: a job that lost a node or
# was preempted is requeued anyway, and one that was cancelled must not come back.
requeue() {
  local state
  state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' || true)
  case $state in
    JobState=RUNNING | JobState=TIMEOUT)
      echo "$1, back into the queue"
      scontrol requeue "$SLURM_JOB_ID"
      ;;
    *) echo "$1 ($state)" ;;
  esac
}
