"""`python -m contrastive_jax.main --config=configs/simclr_vit.py --workdir=runs/first`.

Trains, or with --eval_only evaluates, what a config describes. The same command on the same workdir
continues where it stopped.
"""

from collections.abc import Sequence

from contrastive_jax import cli


def main(argv: Sequence[str]) -> None:
    del argv
    # Not before flags are parsed: a typo is answered at once.
    from contrastive_jax import parallel, train
    from contrastive_jax.workdir import runs

    cli.quiet()
    config = runs.resolve(cli.CONFIG.value, cli.WORKDIR.value, cli.EVAL_ONLY.value)
    cli.compilation_cache()
    cli.cpu_devices(config)
    parallel.initialize(cli.COORDINATOR.value, cli.PROCESSES.value, cli.PROCESS.value)
    train.run(config, cli.WORKDIR.value, eval_only=cli.EVAL_ONLY.value)


def run() -> None:
    cli.command(main, [cli.CONFIG, cli.WORKDIR])


if __name__ == '__main__':
    run()
