#!/usr/bin/env bash
# Trains on Cloud TPU VMs, of one host or many: requests the slice, copies HEAD to every worker and
# runs main there (launch/tpu_worker.sh), showing what they say.
#
#   launch/tpu_vm.sh --name=first --project=PROJECT --zone=ZONE --type=v5litepod-16 \
#     --runtime=v2-alpha-tpuv5-lite --bucket=gs://BUCKET [--spot] [--dry-run] \
#     -- --config=configs/simclr_vit.py:imagenet [--config.key=value ...]
#   launch/tpu_vm.sh --name=first --project=PROJECT --zone=ZONE --delete
#
#   --bucket   the workdir is BUCKET/NAME; each worker's log is copied to BUCKET/NAME/logs
#   --spot     a spot slice: when it is preempted, it is requested again and the run goes on
#   --dry-run  print the commands only
#   --delete   give the slice back; nothing else does, also not the end of the training
#
# The same command again uses the slice that is there, ends what still runs on it and goes on from
# the checkpoint. Project and zone may come from CLOUDSDK_CORE_PROJECT and CLOUDSDK_COMPUTE_ZONE.

set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}
say() { echo "tpu_vm.sh: $*" >&2; }
show() { printf '%q ' "$@" && echo; }

name='' type='' runtime='' bucket='' spot='' dry='' delete=''
project=${CLOUDSDK_CORE_PROJECT:-} zone=${CLOUDSDK_COMPUTE_ZONE:-} poll=${POLL_SECONDS:-20}
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --name=* | --project=* | --zone=* | --type=* | --runtime=* | --bucket=*)
      option=${1%%=*}
      declare "${option#--}=${1#*=}"
      ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --delete) delete=1 ;;
    --) shift && break ;;
    *) fail "got $1; expected the flags that --help lists, then -- and the program's" ;;
  esac
  shift
done
need() { [[ $2 ]] || fail "--$1: got nothing; expected it, as in --$1=$3"; }
need name "$name" first
need project "$project" my-project
need zone "$zone" us-west4-a
where=(--project="$project" --zone="$zone" --quiet)
queued=(gcloud compute tpus queued-resources)

state() { # of the queued resource; GONE where there is none, UNKNOWN where gcloud fails
  local said
  if said=$("${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ ${said,,} == *not_found* || ${said,,} == *'not found'* ]]; then
    echo GONE
  else
    echo "$said" >&2 && echo UNKNOWN
  fi
}
remove=("${queued[@]}" delete "$name" "${where[@]}" --force)
remove() {
  [[ $(state) == GONE ]] || "${remove[@]}"
  until [[ $(state) == GONE ]]; do sleep "$poll"; done
}
if [[ $delete ]]; then
  if [[ $dry ]]; then show "${remove[@]}"; else remove; fi
  exit
fi

need type "$type" v5litepod-16
need runtime "$runtime" v2-alpha-tpuv5-lite
[[ $bucket == gs://?* ]] || fail "--bucket: got '$bucket'; expected it as in --bucket=gs://my-bucket"
workdir=${bucket%/}/$name
[[ " $* " == *' --config'[=\ ]* ]] ||
  fail '--config: got nothing; expected it after --, as in -- --config=configs/simclr_vit.py:imagenet'
[[ " $* " != *' --workdir'[=\ ]* ]] || fail "--workdir: got one; expected none: it is $workdir"

work=/tmp
if [[ ! $dry ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
tree=contrastive_jax.tar.gz
repository=$(dirname "$0")/..
archive=(git -C "$repository" archive --format=tar.gz --output="$work/$tree" HEAD)
create=("${queued[@]}" create "$name" "${where[@]}" --node-id="$name"
  --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot})
copy=(gcloud compute tpus tpu-vm scp "$work/$tree" "$name:" --worker=all "${where[@]}")
unpack="rm -rf contrastive_jax && mkdir contrastive_jax && tar -xzf $tree -C contrastive_jax"
# Without ServerAlive… ssh would wait forever for a host that is gone.
start=(gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}"
  --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4
  --command="$unpack && bash contrastive_jax/launch/tpu_worker.sh $(show "$workdir" "$@")")
if [[ $dry ]]; then
  show "${archive[@]}" && show "${create[@]}" && show "${copy[@]}" && show "${start[@]}" && exit
fi

obtain() { # fails where the request ends without a slice
  local now was=''
  if [[ $(state) == GONE ]]; then "${create[@]}" || return; fi
  while true; do
    now=$(state)
    [[ $now == "$was" ]] || say "$name is $now"
    was=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | GONE) return 1 ;;
    esac
    sleep "$poll"
  done
}
lost() { # whether the slice is gone, which the service may say only after a while
  local node
  for _ in {1..6}; do
    case $(state) in ACTIVE | UNKNOWN) ;; *) return 0 ;; esac
    node=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)') || true
    case $node in PREEMPTED | TERMINATED) return 0 ;; esac
    sleep "$poll"
  done
  return 1
}
copied() { # a slice is ACTIVE a little before its hosts let us in
  for _ in {1..5}; do
    if "${copy[@]}"; then return 0; fi
    sleep "$poll"
  done
  return 1
}

[[ ! $(git -C "$repository" status --porcelain) ]] || say 'changes that are not committed stay here'
"${archive[@]}"
[[ $(state) != UNKNOWN ]] || fail 'gcloud: expected it to know the queued resource or that there is none'
had='' # whether there has been a slice
while true; do
  if obtain; then
    had=1 code=0
    : >"$work/said"
    { copied && "${start[@]}"; } 2>&1 | tee "$work/said" || code=$?
    if grep -q 'worker .* ended with code 2$' "$work/said"; then code=2; fi # a user's mistake
    ((code)) || say 'complete; --delete gives the slice back'
    if ((code == 0 || code == 2)) || [[ ! $spot ]]; then exit "$code"; fi
    say "ended with code $code: was the slice preempted?"
    lost || { say 'no, so it is not started again' && exit "$code"; }
  elif [[ ! $spot || ! $had && $(state) != SUSPEND* ]]; then
    # A request that never became a slice would not become one by being repeated.
    "${queued[@]}" describe "$name" "${where[@]}" || true
    say 'there is no slice; --delete removes the request' && exit 1
  fi
  say 'the slice is gone: requesting it again'
  sleep "$poll"
  remove
done
