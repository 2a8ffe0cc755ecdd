#!/usr/bin/env bash
# Trains on this machine, with one process (the default, which has all devices) or several.
#
#   launch/local.sh [--processes=N] [--dry-run] -- --config=FILE --workdir=DIR [--config.key=value ...]
#   launch/local.sh --processes=2 -- --config=configs/simclr_vit.py --workdir=runs/first
#
#   --processes=N  N processes that share this machine's GPUs evenly; on CPUs each has its own devices
#   --dry-run      print the commands only
#
# TERM or Ctrl-C makes the run save and end (a second one ends it at once); the same command goes on.
# When one process dies, the others are ended and the exit code is that of the first to die.
# PYTHON (default: python) is the interpreter; GRACE (default: 20) the seconds between TERM and KILL.

set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}
say() { echo "local.sh: $*" >&2; }

processes=1 dry=
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --processes=*) processes=${1#*=} ;;
    --dry-run) dry=1 ;;
    --) shift && break ;;
    *) fail "got $1; expected --processes=N or --dry-run, then -- and the program's flags, as in:" \
      'launch/local.sh --processes=2 -- --config=configs/simclr_vit.py --workdir=runs/first' ;;
  esac
  shift
done
[[ $processes =~ ^[1-9][0-9]*$ ]] ||
  fail "--processes: got '$processes'; expected a number above 0, as in --processes=2"
for flag in config=configs/simclr_vit.py workdir=runs/first; do
  [[ " $* " == *" --${flag%%=*}"[=\ ]* ]] ||
    fail "--${flag%%=*}: got nothing; expected it after --, as in -- --$flag"
done

program=("${PYTHON:-python}" -m contrastive_jax.main "$@")
if ((processes == 1)); then
  if [[ $dry ]]; then printf '%q ' "${program[@]}" && echo && exit; fi
  exec "${program[@]}"
fi

# A process takes every GPU it sees, with most of its memory, so each is told which are its own.
gpus=0
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
  if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    gpus=${#visible[@]}
  else
    gpus=$(nvidia-smi -L | grep -c '^GPU' || true)
  fi
  ((gpus % processes == 0)) ||
    fail "--processes: got $processes for $gpus GPUs; expected a number that divides $gpus"
fi

# Below the range that outgoing connections use, and nobody answers there now.
port=
while [[ ! $port ]] || (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  port=$((20000 + RANDOM % 10000))
done

commands=() pids=() printers=() codes=()
for ((i = 0; i < processes; i++)); do
  mine=$(seq -s, $((i * gpus / processes)) $(((i + 1) * gpus / processes - 1)))
  # Without an address JAX's coordinator listens on all of the machine's: nobody outside needs it.
  commands[i]=$(printf '%q ' env "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port" \
    ${mine:+JAX_LOCAL_DEVICE_IDS="$mine"} "${program[@]}" "--coordinator=127.0.0.1:$port" \
    "--processes=$processes" "--process=$i")
done
if [[ $dry ]]; then printf '%s\n' "${commands[@]}" && exit; fi

signals=0
# shellcheck disable=SC2329  # called by trap
stop() {
  signals=$((signals + 1))
  if ((signals == 1)); then
    say 'stopping: the processes save and end (once more: they end at once)'
    # Also for Ctrl-C: TERM is what JAX's preemption service listens to, by which they all stop at
    # one step.
    kill -TERM "${pids[@]}" 2>/dev/null || true
  else
    end
  fi
}
end() { for pid in $(jobs -pr); do kill -KILL -- "-$pid" 2>/dev/null || true; done; }
trap end EXIT
trap stop TERM INT

# With job control each gets a process group of its own, so that Ctrl-C comes once: from `stop`.
set -m
for i in "${!commands[@]}"; do
  # The printers outlive the signals, to show what the processes say last.
  exec {out}> >(trap '' TERM INT && exec sed -u "s/^/[$i] /")
  printers[i]=$!
  eval "exec ${commands[i]}" </dev/null >&"$out" 2>&1 &
  pids[i]=$!
  exec {out}>&-
done
set +m

status=0 deadline=
while ((${#codes[@]} < processes)); do
  for i in "${!pids[@]}"; do
    if [[ ${codes[i]+ended} ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    codes[i]=0
    wait "${pids[i]}" 2>/dev/null || codes[i]=$?
    if ((codes[i] && !status)); then
      status=${codes[i]}
      # The others would wait for it until JAX's heartbeats fail, which takes 100 seconds.
      ((signals)) || say "process $i ended with code $status: ending the others." \
        'The same command continues from the last checkpoint.'
      kill -TERM "${pids[@]}" 2>/dev/null || true
      deadline=$((SECONDS + ${GRACE:-20}))
    fi
  done
  if [[ $deadline ]] && ((SECONDS >= deadline)); then end; fi
  sleep 0.2 || true
done
wait "${printers[@]}" 2>/dev/null || true
exit "$status"
