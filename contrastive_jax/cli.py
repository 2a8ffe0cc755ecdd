"""The command line that all programs of this package share: flags, errors, log lines, devices."""

import logging as stdlib_logging
import math
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from contrastive_jax.config import Config, UserError, unknown

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/, with :preset; --config.key=value changes a key.'
)
WORKDIR = flags.DEFINE_string('workdir', '', 'Where checkpoints, records and pictures go.')
EVAL_ONLY = flags.DEFINE_bool('eval_only', False, "Evaluate the workdir's newest checkpoint.")
COORDINATOR = flags.DEFINE_string(
    'coordinator', '', "host:port of process 0 of a multi-process run; 'auto' on TPU pods and SLURM"
)
PROCESSES = flags.DEFINE_integer('processes', 1, 'How many processes the run has.', lower_bound=1)
PROCESS = flags.DEFINE_integer('process', 0, 'Which of them this is.', lower_bound=0)


def parse(
    argv: Sequence[str], required: Sequence[flags.FlagHolder], positional: bool = False
) -> list[str]:
    """Flags from the command line; whatever is wrong with them becomes a UserError."""
    for argument in argv:
        if argument.startswith('--config='):
            check_file(argument.removeprefix('--config=').partition(':')[0])
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1 and not positional:
            raise UserError(f'unexpected argument {rest[1]!r}; options are written --name=value.')
        for flag in required:
            if not flag.value:
                example = (sys.modules['__main__'].__doc__ or '').partition('\n')[0].strip('`.')
                raise UserError(f'--{flag.name} is required, as in: {example}')
        return rest
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if error.args else error)
        # ml_collections puts what a config file raises into its message, traceback and all.
        _, ours, said = text.rpartition(f'{UserError.__name__}: ')
        if not ours:
            said = text.strip('\'"').replace("\\'", "'").replace('\\n', ' ').replace('\n', ' ')
        if key := next((a.partition('=')[0] for a in argv if f'.{said}=' in a), None):
            said = f'{key}: the preset sets no such key; set it in the file, beside its siblings.'
        raise UserError(said.strip()) from error


def check_file(path: str) -> None:
    """Raises UserError for a config file that does not exist: which ones do."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        exist = os.listdir(folder) if os.path.isdir(folder) else []
        exist = sorted(f for f in exist if f.endswith('.py'))
        raise unknown(f'config file in {folder}', os.path.basename(path), exist, '--config')


def compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second start is quick."""
    import jax

    if jax.config.values['jax_compilation_cache_dir'] is None:
        cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(cache, 'contrastive_jax/xla'))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def cpu_devices(config: Config) -> None:
    """On CPUs one device a core, up to 8, as far as the batch divides; XLA_FLAGS may say otherwise.

    XLA spreads one device's small operations badly over cores, which costs small ViTs the most: see
    docs/results.md. On several, config.microbatch could hang: see docs/troubleshooting.md. No
    effect elsewhere.
    """
    import jax

    if 'host_platform_device_count' in os.environ.get('XLA_FLAGS', '') or COORDINATOR.value:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    rows = max(1, config.batch_size // max(1, config.accumulate))
    most = 1 if config.microbatch else min(cores or 1, 8)
    jax.config.update('jax_num_cpu_devices', math.gcd(most, rows))


def quiet() -> None:
    """Log lines of ours as plain text; of the libraries, warnings and errors."""
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    ours = os.path.dirname(__file__)
    handler.addFilter(lambda r: r.levelno > stdlib_logging.INFO or r.pathname.startswith(ours))
    handler.setFormatter(stdlib_logging.Formatter('%(message)s'))


def command(
    function: Callable[[Sequence[str]], None],
    required: Sequence[flags.FlagHolder],
    positional: bool = False,
) -> None:
    """Runs a program: a user's mistake is one message and exit code 2, never a traceback.

    Args:
        function: of the arguments that are no flags, after the program's name.
        required: flags without which there is nothing to do.
        positional: whether there may be such arguments.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            function(argv)
        except UserError as error:
            fail(error)

    def fail(error: UserError) -> None:
        print(f'error: {error}', file=sys.stderr, flush=True)
        # A process that joined others must not wait for them at exit.
        os._exit(2)

    try:
        app.run(guarded, flags_parser=lambda argv: parse(argv, required, positional))
    except UserError as error:
        fail(error)
