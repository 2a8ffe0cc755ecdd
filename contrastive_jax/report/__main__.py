"""`python -m contrastive_jax.report --workdir=runs/first`.

Writes one HTML page about a run: what was run, its evaluations, curves and pictures, and what it
ran on. --compare=OTHER, which may be repeated, puts another run beside it. The page needs nothing
but itself.
"""

from collections.abc import Sequence

from absl import flags
from etils import epath

from contrastive_jax import cli
from contrastive_jax.config import UserError

COMPARE = flags.DEFINE_multi_string('compare', [], "Another run's workdir; may be repeated.")
OUT = flags.DEFINE_string('out', '', 'The page, an .html file; by default report.html of workdir.')


def main(argv: Sequence[str]) -> None:
    del argv
    if OUT.value and not OUT.value.lower().endswith(('.html', '.htm')):
        raise UserError(f'--out: got {OUT.value!r}; expected a name that ends in .html.')
    workdirs = [cli.WORKDIR.value, *COMPARE.value]
    if len(set(workdirs)) < len(workdirs):
        raise UserError('--compare: got a workdir twice; expected other runs.')
    from contrastive_jax import figures, report
    from contrastive_jax.report import page

    text = page.render(report.read(workdirs)).encode()
    out = OUT.value or str(epath.Path(cli.WORKDIR.value) / 'report.html')
    figures.write(text, out)
    print(f'{out}: {len(text) / 1e6:.1f} MB')


if __name__ == '__main__':
    cli.command(main, [cli.WORKDIR])
