# shellcheck shell=bash
# What the jobs share: the interpreter, data on the node's own disk, and the way back into the queue. Source it from the
# repository's root, in a batch script.

again=75 # the status of a program that saved its state and wants to go on (EX_TEMPFAIL of sysexits.h)

# The interpreter, as an array: in the image, or of the environment that ./run.sh makes.
# shellcheck disable=SC2034  # the scripts that source this file use it
if [ -n "${IMAGE:-}" ]; then
  program=(apptainer exec --nv --bind "$PWD" ${STAGE_TO:+--bind "$STAGE_TO"} "$IMAGE" python)
else
  program=("$PWD/.venv/bin/python")
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# srun does not take over the number of cores from sbatch since Slurm 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# DataLoader workers are processes; one thread each is enough.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# What torchrun leaves its processes to save a checkpoint in, in seconds, from SIGTERM on; torch that does not know the
# variable leaves them 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

stage_data() { # copy STAGE_FROM to STAGE_TO on every node; what is there already is not copied again
  [ -n "${STAGE_FROM:-}" ] || return 0
  : "${STAGE_TO:?STAGE_FROM needs STAGE_TO, a folder on the disk of the nodes}"
  echo "$(date '+%F %T') copying $STAGE_FROM to $STAGE_TO on $SLURM_NNODES nodes"
  # Times are kept: the indexes of the tars are valid for the copies too.
  # shellcheck disable=SC2016  # the inner shell expands them
  srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c 'mkdir -p "$2" && rsync -a --partial "$1/" "$2/"' bash \
    "$STAGE_FROM" "$STAGE_TO"
}

run_steps() { # run a command; at USR1 or TERM end it and put the job back into the queue, so too at status 75
  local status=0
  interrupted=false steps=
  # Before the start: a signal that comes early must not end this script alone.
  trap 'interrupted=true; [ -z "$steps" ] || kill -TERM "$steps" 2>/dev/null || true' USR1 TERM
  "$@" &
  steps=$!
  [ "$interrupted" = false ] || kill -TERM "$steps" 2>/dev/null || true
  # A signal ends `wait` before the command ends: wait again.
  while true; do
    status=0
    wait "$steps" || status=$?
    kill -0 "$steps" 2>/dev/null || break
  done
  trap - USR1 TERM
  echo "$(date '+%F %T') status $status, interrupted: $interrupted"
  if [ "$status" -eq 0 ]; then
    return 0
  fi
  # torchrun ends with status 1 after a signal, whatever its processes end with, so the signal counts as well.
  if [ "$status" -eq "$again" ] || [ "$interrupted" = true ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  exit "$status"
}
