#!/usr/bin/env bash
# SimCLR on CIFAR-10 with a small ResNet and a small ViT, each about 7 minutes on 2 CPU cores:
# kNN (k 200, T 0.1, 50,000 bank images) of raw pixels, untrained and trained, and images/s.
# usage: benchmarks/cifar10_small.sh ROOT OUT      ROOT holds {train,test}/<class>/*.{jpg,png}
set -euo pipefail
[ $# = 2 ] || { sed -n 2,4p "$0"; exit 2; }
cd "$(dirname "$0")/.."
for encoder in resnet vit; do
    python -m contrastive_jax.main --config="configs/simclr_$encoder.py:cifar10_small" \
        --config.data.source=folder --config.data.root="$1" --workdir="$2/$encoder" \
        --config.evals="{'knn': {'k': 200, 'temperature': 0.1}}"
done
