"""`python -m contrastive_jax.export --workdir=runs/first --format=timm --out=vit`.

Writes the encoder of a run's newest checkpoint, or of another file of weights, and how it sees:

| --format | --out | what reads it |
|---|---|---|
| safetensors | a file | `contrastive_jax.load`, `--config.init_from` |
| timm | a folder | `timm.create_model('local-dir:OUT', pretrained=True)` |
| transformers | a folder | `AutoModel.from_pretrained(OUT)` |
| stablehlo | a file, and a .json beside it | `jax.export.deserialize`, without this package |
"""

import json
import os
from collections.abc import Callable, Sequence

from absl import flags, logging
from etils import epath

from contrastive_jax import cli
from contrastive_jax.config import UserError, choose

FORMAT = flags.DEFINE_string('format', 'safetensors', 'safetensors, timm, transformers, stablehlo.')
OUT = flags.DEFINE_string('out', '', 'The file or the folder; its parents are made.')
PIXELS = flags.DEFINE_string(
    'pixels', 'uint8', 'What stablehlo takes: uint8, or float32 from 0 to 1.'
)


def main(argv: Sequence[str]) -> None:
    del argv
    write = choose('format', FORMAT.value, FORMATS, '--format')
    choose('pixels', PIXELS.value, dict.fromkeys(('uint8', 'float32')), '--pixels')
    out = epath.Path(OUT.value)
    if write in (_safetensors, _stablehlo) and out.is_dir():
        raise UserError(f'--out: {OUT.value} is a folder; {FORMAT.value} is a file.')
    if write in (_timm, _transformers) and out.is_file():
        raise UserError(f'--out: {OUT.value} is a file; {FORMAT.value} is a folder.')
    if write is _safetensors and out.suffix != '.safetensors':
        raise UserError(f'--out: got {OUT.value!r}; expected a name that ends in .safetensors.')
    cli.quiet()
    cli.compilation_cache()
    for name, content in write(cli.WORKDIR.value, OUT.value).items():
        from contrastive_jax.weights import files

        files.write(content, name)
        logging.info('%s: %.1f MB', name, len(content) / 1e6)


def _safetensors(workdir: str, out: str) -> dict[str, bytes]:
    from contrastive_jax import inference, weights

    found = inference.weights_of(workdir)
    about = json.dumps(weights.described(found), indent=2) + '\n'
    return {f'{os.path.splitext(out)[0]}.json': about.encode(), out: weights.content(found)}


def _timm(workdir: str, out: str) -> dict[str, bytes]:
    return _folder('timm', workdir, out)


def _transformers(workdir: str, out: str) -> dict[str, bytes]:
    return _folder('transformers', workdir, out)


def _folder(target: str, workdir: str, out: str) -> dict[str, bytes]:
    from contrastive_jax import inference
    from contrastive_jax.weights import targets

    found = getattr(targets, target)(inference.weights_of(workdir))
    return {os.path.join(out, name): targets.content(x) for name, x in found.items()}


def _stablehlo(workdir: str, out: str) -> dict[str, bytes]:
    from contrastive_jax import inference
    from contrastive_jax.weights import stablehlo

    program, about = stablehlo.make(inference.weights_of(workdir), PIXELS.value)
    about = {'file': os.path.basename(out), **about}
    return {f'{out}.json': (json.dumps(about, indent=2) + '\n').encode(), out: program}


FORMATS: dict[str, Callable[[str, str], dict[str, bytes]]] = {
    'safetensors': _safetensors,
    'timm': _timm,
    'transformers': _transformers,
    'stablehlo': _stablehlo,
}


if __name__ == '__main__':
    cli.command(main, [cli.WORKDIR, OUT])
