"""Contrastive and self-supervised pretraining in JAX: one trainer, one file a method."""

import time

STARTED = time.monotonic()  # near enough to the process's start to say how long starting took
