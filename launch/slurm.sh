#!/usr/bin/env bash
#SBATCH --job-name=contrastive_jax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#
# Trains on a SLURM cluster, one process a GPU (one a node where there are none).
#
#   sbatch --nodes=2 --gpus-per-node=8 --exclusive launch/slurm.sh --config=FILE --workdir=DIR
#   launch/slurm.sh --dry-run --config=FILE --workdir=DIR     # only prints the srun command
#
# Flags of sbatch come before the script, the program's after it. Every process decodes images:
# give it CPUs, with --exclusive or with --ntasks-per-node=8 --cpus-per-task=8. The workdir must be
# where all nodes see it. PYTHON (default: python) is the interpreter on the nodes.
#
# 120 seconds before the time limit, or when it is preempted with a grace time, the run saves and
# the job is queued again under its number; it then goes on from that step. The same after a node
# failed, from the last checkpoint. A mistake or a crash ends the job.

set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

example='sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config=configs/simclr_vit.py:imagenet --workdir=/shared/run'
flags=() dry=
for flag in "$@"; do
  case $flag in
    -h | --help) sed -n '6,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --dry-run) dry=1 ;;
    *) flags+=("$flag") ;;
  esac
done
for flag in config workdir; do
  [[ " ${flags[*]} " == *" --$flag"[=\ ]* ]] ||
    fail "--$flag: got nothing; expected it after the script, as in: $example"
done
[[ $dry || ${SLURM_JOB_ID:-} ]] ||
  fail "SLURM_JOB_ID: got nothing; expected to be started by sbatch, as in: $example"

nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}}
gpus=${gpus##*:} # 'a100:8' is 8
[[ $gpus =~ ^[0-9]+$ ]] || fail "SLURM_GPUS_ON_NODE: got '$gpus'; expected a number of GPUs"
if ((gpus == 0)); then echo 'slurm.sh: no GPUs (--gpus-per-node=N): one process a node' >&2; fi
tasks=$((gpus ? gpus : 1))

# One task a GPU, each of which sees all of its node's: JAX's detection of SLURM gives a process the
# one device whose number is SLURM_LOCALID. With one task a node it would leave the others idle;
# with --gpus-per-task=1, without --gpu-bind=none, that number would not exist.
#
# --kill-on-bad-exit ends the others when a task fails, --wait a minute after one has left them.
# --overcommit: starts even where the job has fewer CPUs than tasks. --cpu-bind=none: the threads
# that decode images may use all CPUs of the job.
srun=(srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks"
  --kill-on-bad-exit=1 --wait=60 --label --unbuffered --cpu-bind=none)
if ((gpus)); then srun+=(--gpu-bind=none); fi
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
  srun+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it since SLURM 22.05
else
  srun+=(--overcommit)
fi

# SLURM sends TERM, at the time limit and at preemption alike, to all processes of the step and not
# to this script (so no B: in --signal; and TERM sent to srun would make it KILL the tasks). The
# program then saves and exits with 0, as if it were complete: this shell around it, which has got
# the signal too, tells the two apart. 75 is EX_TEMPFAIL. A single process may also die of TERM
# before it listens (with several, JAX catches it); then nothing is lost, and it counts as well.
again=75
# shellcheck disable=SC2016  # expanded on the nodes
task='trap stopped=1 TERM
code=0; "$@" || code=$?
if [[ ${stopped-} ]] && ((code == 0 || code == 143 && SLURM_NTASKS == 1)); then code='$again'; fi
exit "$code"'
command=("${srun[@]}" bash -c "$task" task
  "${PYTHON:-python}" -m contrastive_jax.main "${flags[@]}" --coordinator=auto)

if [[ $dry ]]; then printf '%q ' "${command[@]}" && echo && exit; fi
echo "slurm.sh: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $nodes nodes × $tasks processes"
code=0
"${command[@]}" || code=$?
# srun returns the highest code of all tasks. What crashed with a higher one is not queued again; nor
# is a job that was cancelled, because scancel ends this script too.
if ((code == again)); then
  echo "slurm.sh: stopped and saved; queued again as job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
