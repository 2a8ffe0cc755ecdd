"""Nearest neighbours: test images and the training images that an encoder takes to be alike.

M: queries, N: training images, D: features, k: neighbours.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from contrastive_jax import evaluation, figures, parallel
from contrastive_jax.config import check_range
from contrastive_jax.evals import knn
from contrastive_jax.evaluation import Evaluate
from contrastive_jax.evaluation.subject import Subject, gather
from contrastive_jax.figures import COLOURS


def make(count: int = 8, k: int = 10, label: str = 'label') -> Evaluate:
    """Draws test images, evenly spread over the split, and the k training images nearest to each.

    Nearest by the cosine of their features, which is written below them with the class; those of
    another class than the query's are marked.

    Args:
        count: queries, from 1.
        k: neighbours, from 1.
        label: the one of the data's labels that is compared.

    Returns:
        `evaluate(subject)`, which yields the picture 'sheet'. Nothing where there is no test split.

    Raises:
        UserError: a value outside its range.
    """
    check_range('config.evals.neighbours', {'count': count, 'k': k}, least=1, whole=True)
    say = evaluation.missed('Nearest neighbours')

    def evaluate(subject: Subject) -> Iterator[tuple[str, bytes]]:
        if reason := subject.no_images():
            say(reason)
            return
        if 'test' not in subject.splits:
            say('there is no test split')
            return
        test, train = (subject.features(split, label=label) for split in ('test', 'train'))
        names = subject.classes.get(label, [])
        # Padding and bad records are rows of zeros.
        usable = [np.flatnonzero(parallel.to_host((f.x_ND != 0).any(1))) for f in (test, train)]
        if not all(map(len, usable)):
            say('all features are zero')
            return
        some = usable[0][evaluation.spread(len(usable[0]), count)]
        counts_N = np.isin(np.arange(len(train.label_N)), usable[1])
        query_MD = gather(subject.mesh, test.x_ND, some)
        with jax.set_mesh(subject.mesh):
            found = knn.nearest(query_MD, train.x_ND, counts_N, k=min(k, len(usable[1])))
        scores_Mk, rows_Mk = map(parallel.to_host, found)
        queries = subject.rows('test', some)[0]['image']
        images = subject.rows('train', rows_Mk.ravel())[0]['image']
        images = images.reshape(*rows_Mk.shape, *images.shape[1:])
        rows = []
        for m, own in enumerate(test.label_N[some].tolist()):
            tiles = [figures.Tile(queries[m], _name(names, own), '', COLOURS[0])]
            for image, score, row in zip(images[m], scores_Mk[m], rows_Mk[m], strict=True):
                other = int(train.label_N[row])
                name, frame = _name(names, other), ''
                if own >= 0 and other >= 0 and own != other:
                    name, frame = f'✗ {name}', COLOURS[1]
                tiles.append(figures.Tile(image, name, f'{score:.3f}', frame))
            rows.append(tiles)
        columns = len(rows[0]) - 1
        yield 'sheet', figures.tile_rows(rows, ['test', *(f'{i + 1}' for i in range(columns))])

    return evaluate


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else ''
