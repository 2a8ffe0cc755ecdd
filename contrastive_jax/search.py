"""`python -m contrastive_jax.search --workdir=runs/clip --index=photos.npz 'a dog on the beach'`.

Prints what an index of `embed` has that is nearest to a text or, if the query is the path of a
picture, to that picture: rank, cosine, path. --out draws what was found.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from contrastive_jax import cli
from contrastive_jax.config import UserError

INDEX = flags.DEFINE_string('index', '', 'The .npz or .parquet file that `embed` has written.')
IMAGE = flags.DEFINE_multi_string('image', [], 'A picture to search for; as a path without a flag.')
K = flags.DEFINE_integer('k', 10, 'How many to find.', lower_bound=1)
OUT = flags.DEFINE_string('out', '', 'Contact sheet to draw, a PNG file; of pictures alone.')


def main(argv: Sequence[str]) -> None:
    from contrastive_jax.data.sources.folder import SUFFIXES

    queries = [(text, text.lower().endswith(SUFFIXES)) for text in argv[1:]]
    queries += [(path, True) for path in IMAGE.value]
    if not queries:
        raise UserError('expected a query, a text or the path of a picture.')
    for query, is_path in queries:
        if is_path and not os.path.isfile(query):
            raise UserError(f'query: {query!r} does not exist.')
        if not query.strip():
            raise UserError('query: the text is empty.')
    if OUT.value and not OUT.value.lower().endswith('.png'):
        raise UserError(f'--out: got {OUT.value!r}; expected a name that ends in .png.')
    from contrastive_jax import figures, inference
    from contrastive_jax import index as indices

    index = indices.read(INDEX.value)
    about = index.about
    if OUT.value and about.kind != 'images':
        raise UserError(f'--out: {INDEX.value} is of texts, which are not drawn.')
    cli.quiet()
    cli.compilation_cache()
    encoder = inference.load(cli.WORKDIR.value, batch_size=min(len(queries), 8))
    indices.check(index, encoder)
    texts = [query for query, is_path in queries if not is_path]
    pictures = [query for query, is_path in queries if is_path]
    if texts and about.name != 'embedding':
        raise UserError(
            f'--index: {INDEX.value} is of {about.name!r}, a space without texts; they need a '
            'method that reads texts, and `embed --what=embedding`.'
        )
    rows: dict[str, np.ndarray] = {}
    if texts:
        rows |= zip(texts, encoder.texts(texts), strict=True)
    if pictures:
        rows |= zip(pictures, encoder(pictures, about.name), strict=True)
    scores, found = indices.nearest(index, np.stack([rows[q] for q, _ in queries]), K.value)
    sheet = []
    for (query, is_path), scores_k, found_k in zip(queries, scores, found, strict=True):
        print(query)
        tiles = []
        for rank, (score, row) in enumerate(zip(scores_k, found_k, strict=True), 1):
            item = index.items[row]
            print(f'{rank:5d}  {score:6.3f}  {item}')
            if OUT.value:
                stem = os.path.splitext(os.path.basename(item))[0]
                image = _picture(os.path.join(about.root, item))
                tiles.append(figures.Tile(image, f'{rank}   {score:.3f}', stem))
        shown = (os.path.basename(query), _picture(query)) if is_path else (query, None)
        sheet.append((*shown, tiles))
    if OUT.value:
        figures.write(figures.contact_sheet(sheet), OUT.value)


def _picture(path: str) -> Any:
    """[H, W, 3] uint8; None where the file is gone since the index was made."""
    from contrastive_jax.data import BadRecord
    from contrastive_jax.data.decode import decode

    try:
        with open(path, 'rb') as file:
            return decode(file.read())
    except (OSError, BadRecord):
        return None


if __name__ == '__main__':
    cli.command(main, [cli.WORKDIR, INDEX], positional=True)
