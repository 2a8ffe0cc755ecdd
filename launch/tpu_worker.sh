#!/usr/bin/env bash
# Started by launch/tpu_vm.sh on every worker of a slice, in the copy of the repository there:
# ends what an earlier start left, installs, trains, and keeps the log on the bucket.
#
#   launch/tpu_worker.sh gs://BUCKET/NAME --config=FILE [--config.key=value ...]

set -euo pipefail

if [[ ${1:---help} == --help ]]; then sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit; fi
workdir=$1
shift
cd "$(dirname "$0")/.."
host=$(hostname)
mkdir -p ~/contrastive_jax_logs
log=~/contrastive_jax_logs/$host-$(date -u +%Y%m%dT%H%M%SZ).log
uploader='' stopped=''

upload() { gcloud storage cp --quiet "$log" "$workdir/logs/" >/dev/null 2>&1 || true; }
# shellcheck disable=SC2329  # called by trap
ended() { # said here, because tpu_vm.sh sees gcloud's exit code only
  local code=$?
  if [[ $uploader ]]; then kill "$uploader" && upload; fi
  echo "worker $host ended with code $code"
}
trap ended EXIT

# A process that outlived its connection still holds the chips.
running=${TMPDIR:-/tmp}/contrastive_jax.pid
if [[ -f $running ]] && kill -TERM "$(<"$running")" 2>/dev/null; then
  for _ in {1..60}; do kill -0 "$(<"$running")" 2>/dev/null && sleep 1; done
  kill -KILL "$(<"$running")" 2>/dev/null || true
fi

# uv, because the workers' images may have an older Python than we need, and it fetches one; gcsfs
# (in epath-gcs), because the workdir is a bucket.
# Exit code 1, because 2 means a mistake in the program's flags, which is not tried again.
{
  python3 -m pip install --quiet --user uv &&
    ~/.local/bin/uv venv --quiet --clear --python '>=3.11' .venv &&
    ~/.local/bin/uv pip install --quiet --python .venv/bin/python '.[tpu]' 'etils[epath-gcs]'
} || exit 1

# A preempted host gets TERM, all its processes at once; if there is time, the run saves and exits
# with 0, as if it were complete. 75 (EX_TEMPFAIL) tells the two apart.
trap stopped=1 TERM
.venv/bin/python -m contrastive_jax.main "$@" "--workdir=$workdir" --coordinator=auto \
  > >(trap '' TERM && tee "$log" | sed -u "s/^/[$host] /") 2>&1 &
pid=$!
echo "$pid" >"$running"
# A preempted host's disk is gone with it.
(
  trap 'kill $! && exit' TERM
  while true; do
    sleep 60 &
    wait $!
    upload
  done
) </dev/null >/dev/null 2>&1 &
uploader=$!
code=0
wait "$pid" || code=$?
if [[ $stopped ]]; then
  code=0
  wait "$pid" || code=$?
  if ((code == 0)); then code=75; fi
fi
rm -f "$running"
sleep 1 # for the last lines to be written
exit "$code"
