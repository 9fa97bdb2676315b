# shellcheck shell=bash
# Sourced by the SLURM jobs beside it, in the folder of train.py: one torchrun a node, and the way back into the queue.

# shellcheck source=launch/environment.sh
. launch/environment.sh

log_dir=${LOG_DIR:-runs/slurm}
attempt=${SLURM_RESTART_COUNT:-0}
# What a job that goes on where it was ended sets: at the time limit it is then requeued.
goes_on=
# This shell must outlive srun to put the job back into the queue.
signalled=
requeued=
step=
# Where the run stood when this attempt began, in words; what goes back into the queue leaves them in the file.
begins=
# What stands there for an attempt that could not find that out.
# shellcheck disable=SC2034 # read by the jobs
no_answer="no answer"
begun_file=$log_dir/${SLURM_JOB_ID:-none}.begun
trap 'signalled=yes' USR1
trap on_sigterm TERM

# At the time limit SLURM sends SIGTERM, and after its KillWait SIGKILL, to this shell too: if the ranks do not end by
# then, nothing that comes after them is ever run. (srun gets it as well, and ends the ranks.)
on_sigterm() {
  # shellcheck disable=SC2034 # read by the jobs
  signalled=yes
  if [[ -n $goes_on && -n $step ]] && is_out_of_time; then
    requeue "out of time"
  fi
}

# run_on_nodes ARGUMENTS: launch/torchrun_node.sh with them on every node; returns the status of the worst.
run_on_nodes() {
  local status=0
  mkdir -p "$log_dir"
  head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export NNODES=$SLURM_JOB_NUM_NODES
  export RDZV_ENDPOINT=$head_node:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  # With the attempt in it, what is left of an earlier attempt cannot join this one.
  export RDZV_ID=$SLURM_JOB_ID-$attempt
  local ranks=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  if ((${SLURM_CPUS_ON_NODE:-$ranks} < ranks)); then
    echo "warning: $SLURM_CPUS_ON_NODE CPU for $ranks ranks of a node; sbatch --cpus-per-task=NUMBER gives a node more"
  fi
  echo "attempt $attempt on $SLURM_JOB_NODELIST, logs in $log_dir/$SLURM_JOB_ID-*.log"
  # cpu-bind: SLURM may otherwise bind the one task of a node, and so all its ranks, to a single core.
  srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --cpu-bind=none \
    --kill-on-bad-exit=1 --open-mode=append --output="$log_dir/%j-%N.log" launch/torchrun_node.sh "$@" &
  step=$!
  # Only while it waits for a process in the background does bash run a trap at once, and `wait` returns early then.
  while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true
  done
  wait "$step" || status=$?
  step=
  return "$status"
}

# a_node_is_lost: whether one of the job's nodes does not answer. SLURM finds that out only after its SlurmdTimeout; ranks
# whose connections broke have failed long before, and would take the job with them.
a_node_is_lost() {
  ! timeout "${NODE_TIMEOUT:-60}" srun --overlap --ntasks-per-node=1 --cpu-bind=none true >/dev/null 2>&1
}

# is_out_of_time: whether the job is being ended because of its time limit. Its state is COMPLETING then, as it is after
# scancel; only the reason tells them apart.
is_out_of_time() {
  [[ $(shown_job) =~ \ JobState=(TIMEOUT|COMPLETING)\ Reason=TimeLimit\  ]]
}

shown_job() {
  scontrol show job --oneliner "$SLURM_JOB_ID" || true
}

# gets_nowhere: whether the job has put itself back into the queue MAX_REQUEUES times from where it begins now.
gets_nowhere() {
  local times
  times=$(grep -cxF -e "$begins" "$begun_file" 2>/dev/null || true)
  ((${times:-0} > 0 && times >= ${MAX_REQUEUES:-3}))
}

# give_up REASON [HINT]: says so. Whoever has repaired what kept the job may requeue it by hand: it counts anew then.
give_up() {
  echo "error: back from the queue ${MAX_REQUEUES:-3} times $1 (MAX_REQUEUES): not started again${2:-}" >&2
  rm -f "$begun_file"
}

# requeue REASON: puts the job back into the queue, unless SLURM has decided about it already: a job that lost a node or
# was preempted is requeued anyway, and one that was cancelled must not come back. A job that cannot go on where it was
# ended would reach its time limit again and again.
requeue() {
  if [[ -n $requeued ]]; then
    return
  fi
  if ((${MAX_REQUEUES:-3} == 0)); then
    echo "$1; not put back into the queue (MAX_REQUEUES=0)"
    return
  fi
  if [[ $(shown_job) == *" JobState=RUNNING "* ]] || { [[ -n $goes_on ]] && is_out_of_time; }; then
    echo "$1, back into the queue"
    requeued=yes
    if [[ -n $begins ]]; then
      # A full disk must not keep the job from the queue.
      { mkdir -p "$log_dir" && echo "$begins" >>"$begun_file"; } || true
    fi
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "$1 ($(shown_job | grep -o 'JobState=[A-Z_]*'))"
  fi
}
