#!/usr/bin/env bash
# Seconds from process start to the end of the first training step on digits, without and with
# JAX's compilation cache, with the evaluations of step 0 (the default) and without.
# usage: benchmarks/startup.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export XDG_CACHE_HOME="$out/cache"
for evals in default none; do
    for start in cold warm; do
        flags=()
        [ $evals = none ] && flags+=('--config.evals={}')
        [ $start = cold ] && rm -rf "$XDG_CACHE_HOME"
        python -m contrastive_jax.main --config=configs/simclr_vit.py --config.total_steps=1 \
            --workdir="$out/$evals-$start" "${flags[@]}" 2>&1 |
            sed -n "s/^first training step after/$start cache, evaluations: $evals:/p"
    done
done
