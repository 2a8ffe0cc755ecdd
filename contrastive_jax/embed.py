"""`python -m contrastive_jax.embed --workdir=runs/clip --images=DIR --out=photos.npz`.

Writes one unit row for each picture below a directory, or for each line of a text file, as the
newest checkpoint's encoder sees it: see `index`. Several processes (--coordinator, --processes,
--process) read a share each; the first one writes the file, the same bytes.
"""

from collections.abc import Sequence

from absl import flags, logging

from contrastive_jax import cli
from contrastive_jax.config import UserError

IMAGES = flags.DEFINE_string('images', '', 'Directory of JPEG, PNG and WebP files, at any depth.')
TEXTS = flags.DEFINE_string('texts', '', 'UTF-8 file with one text a line, none of them empty.')
OUT = flags.DEFINE_string('out', '', 'The .npz or .parquet file; its directory is made.')
WHAT = flags.DEFINE_string(
    'what', '', "'features' or 'embedding', which texts share; '': the latter where there is one."
)
BATCH_SIZE = flags.DEFINE_integer('batch_size', 64, 'Pictures or texts a device and step.')
MAX_BAD = flags.DEFINE_float('max_bad', 0.01, 'A larger share of unusable pictures is an error.')


def main(argv: Sequence[str]) -> None:
    del argv
    if bool(IMAGES.value) == bool(TEXTS.value):
        raise UserError('expected one of --images=DIR and --texts=FILE.')
    if TEXTS.value and WHAT.value not in ('', 'embedding'):
        raise UserError(f"--what: got {WHAT.value!r}; of texts there is the 'embedding' alone.")
    import jax

    from contrastive_jax import index, inference, parallel

    index.prepare(OUT.value)
    cli.quiet()
    cli.compilation_cache()
    parallel.initialize(cli.COORDINATOR.value, cli.PROCESSES.value, cli.PROCESS.value)
    encoder = inference.load(cli.WORKDIR.value, batch_size=BATCH_SIZE.value)
    if TEXTS.value:
        made = index.of_texts(encoder, TEXTS.value)
    else:
        name = WHAT.value or ('embedding' if 'embedding' in encoder.outputs else 'features')
        made = index.of_images(encoder, IMAGES.value, name, MAX_BAD.value)
    if jax.process_index() == 0:
        index.write(made, OUT.value)
        count, size = made.rows_ND.shape
        logging.info(
            '%s: %s of step %d, %d x %d', OUT.value, made.about.name, encoder.step, count, size
        )


if __name__ == '__main__':
    cli.command(main, [cli.WORKDIR, OUT])
