#!/usr/bin/env bash
# Prints a JobSet (jobset.sigs.k8s.io, 0.7 or newer) that trains on one TPU slice of GKE or on hosts
# with GPUs; --apply hands it to kubectl.
#
#   launch/kubernetes.sh --kind=tpu --name=first --image=IMAGE --accelerator=tpu-v5-lite-podslice \
#     --topology=4x4 --hosts=4 --chips-per-host=4 --workdir=gs://BUCKET/first \
#     -- --config=configs/simclr_vit.py:imagenet [--config.key=value ...]
#   launch/kubernetes.sh --kind=gpu --name=first --image=IMAGE --hosts=2 --chips-per-host=8 \
#     --workdir=gs://BUCKET/first -- --config=configs/simclr_vit.py:imagenet
#
#   --image           has this package with its tpu or cuda extra, and its configs/ in the work folder
#   --accelerator     tpu: required; gpu: a value of the label cloud.google.com/gke-accelerator, or none
#   --topology        tpu only; its product is hosts × chips-per-host
#   --max-restarts=N  how often a lost host starts all hosts again, from the checkpoint (default 20)
#   --apply           pipe to kubectl apply; otherwise (--dry-run) only print

set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

kind='' name='' image='' accelerator='' topology='' hosts='' chips_per_host='' workdir='' apply=''
max_restarts=20
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --kind=* | --name=* | --image=* | --accelerator=* | --topology=* | --hosts=* | \
      --chips-per-host=* | --workdir=* | --max-restarts=*)
      option=${1%%=*} option=${option#--}
      declare "${option//-/_}=${1#*=}"
      ;;
    --apply) apply=1 ;;
    --dry-run) apply='' ;;
    --) shift && break ;;
    *) fail "got $1; expected the flags that --help lists, then -- and the program's" ;;
  esac
  shift
done
check() { # flag, value, pattern, what is expected
  [[ $2 =~ ^$3$ ]] || fail "$1: got '$2'; expected $4"
}
count='[1-9][0-9]{0,5}'
check --kind "$kind" 'tpu|gpu' 'tpu or gpu, as in --kind=tpu'
# Pods are called NAME-workers-0-HOST, of which a name in DNS leaves this much to NAME.
check --name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
  'up to 40 lower-case letters, digits and dashes, as in --name=first'
check --image "$image" '[^[:space:]"]+' 'a container image, as in --image=REGISTRY/contrastive_jax:1'
check --hosts "$hosts" "$count" 'a number above 0, as in --hosts=4'
check --chips-per-host "$chips_per_host" "$count" 'a number above 0, as in --chips-per-host=4'
check --workdir "$workdir" '[^[:space:]"]+' 'what all hosts see, as in --workdir=gs://BUCKET/first'
check --max-restarts "$max_restarts" '[0-9]{1,6}' 'a number, as in --max-restarts=20'
[[ " $* " == *' --config'[=\ ]* ]] ||
  fail '--config: got nothing; expected it after --, as in -- --config=configs/simclr_vit.py:imagenet'
label='[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?'

annotations='' selector='' joins='' shm=''
if [[ $kind == tpu ]]; then
  check --accelerator "$accelerator" "$label" 'as in --accelerator=tpu-v5-lite-podslice'
  check --topology "$topology" "$count(x$count){1,2}" 'as in --topology=4x4'
  ((${topology//x/*} == hosts * chips_per_host)) || fail "--topology: got $topology, ${topology//x/*} =" \
    "$((${topology//x/*})) chips; expected --hosts × --chips-per-host = $hosts × $chips_per_host chips"
  resource=google.com/tpu
  # All hosts on one slice, which is one node pool, and nobody else there.
  annotations='
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool'
  selector="
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology"
  # GKE tells the hosts of a slice about each other (TPU_WORKER_HOSTNAMES), and JAX reads it.
  if ((hosts > 1)); then joins=' --coordinator=auto'; fi
else
  [[ ! $topology ]] || fail "--topology: got $topology with --kind=gpu; expected it with --kind=tpu"
  resource=nvidia.com/gpu
  if [[ $accelerator ]]; then
    check --accelerator "$accelerator" "$label" 'as in --accelerator=nvidia-h100-80gb'
    selector="
            nodeSelector:
              cloud.google.com/gke-accelerator: $accelerator"
  fi
  # NCCL's shared memory does not fit into the 64 MB that containers have.
  shm='
              volumeMounts: [{name: shm, mountPath: /dev/shm}]
            volumes: [{name: shm, emptyDir: {medium: Memory}}]'
  # JobSet's name of the first pod; each pod's index is its process.
  if ((hosts > 1)); then
    joins=" --coordinator=$name-workers-0-0.$name:1234 --processes=$hosts"
    joins+=" --process=\"\$JOB_COMPLETION_INDEX\""
  fi
fi
quoted=''
for argument in "$@" "--workdir=$workdir"; do
  argument=${argument//\\/\\\\}
  argument=${argument//\"/\\\"}
  argument=${argument//\$(/\$\$(} # Kubernetes would expand it
  quoted+="
              - \"$argument\""
done

# A pod that is evicted gets TERM, saves and exits with 0, which Kubernetes would take for complete:
# the shell passes TERM on and exits with 143, so that all hosts are started again. A user's mistake,
# exit code 2, is not: the JobSet fails at once.
manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$annotations
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    restartStrategy: BlockingRecreate
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: main, operator: In, values: [2]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120$selector
            tolerations: [{key: $resource, operator: Exists, effect: NoSchedule}]
            containers:
            - name: main
              image: \"$image\"
              resources:
                limits: {$resource: $chips_per_host}
              command:
              - sh
              - -c
              - |
                python -m contrastive_jax.main \"\$@\"$joins & pid=\$!
                trap 'stopped=1; kill -TERM \$pid' TERM
                code=0; wait \$pid || code=\$?
                if [ \"\${stopped-}\" ]; then
                  code=0; wait \$pid || code=\$?
                  if [ \$code = 0 ]; then code=143; fi
                fi
                exit \$code
              - main
              args:$quoted$shm"

if [[ $apply ]]; then
  command -v kubectl >/dev/null || fail '--apply: kubectl is not on PATH'
  kubectl apply --filename=- <<<"$manifest"
else
  printf '%s\n' "$manifest"
fi
