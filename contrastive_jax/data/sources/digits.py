"""scikit-learn's handwritten digits: 1,797 real scans of 8 × 8 pixels, embedded, no download.

'digits' are the scans. 'digits:grids' are images with captions: four digits in a 2 × 2 grid of
16 × 16 pixels, 8,000 for training and 1,000 for testing, made of the same split of the scans. No
combination of four digits occurs twice, so that a full description is one image's alone and those
of test have never been seen. The label is the digit at the top left.

    three and seven above one and zero
    top row three seven, bottom row one zero
    a seven at the top right

The third kind says a random one of the four corners, only in training: with it a prompt such as
'a {} at the top left' means something.
"""

import gzip
import importlib.util
import os

import numpy as np
from einops import rearrange

from contrastive_jax.config import UserError
from contrastive_jax.data import Record, Source, Subset, labelled

TEST = 500
GRIDS = {'train': 8000, 'test': 1000}
NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
CORNERS = ['top left', 'top right', 'bottom left', 'bottom right']


class Digits:
    """All 1,797 digits, grey in 3 equal channels."""

    def __init__(self) -> None:
        table_NC = _table()
        # The scans have 17 levels, 0..16.
        grey_NHW = np.round(table_NC[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        self.images_NHWC = np.repeat(grey_NHW[..., None], 3, axis=-1)
        self.labels_N = table_NC[:, 64].astype(np.int32)
        self.classes = labelled([str(d) for d in range(10)])

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> Record:
        return {'image': self.images_NHWC[index], 'label': int(self.labels_N[index])}

    def describe(self, index: int) -> str:
        return f'digits[{index}]'


class Grids:
    """Grids of four digits, put together when they are asked for.

    Args:
        scans: the digits that they may use.
        digits_N4: which digit stands in each corner, in the order of CORNERS.
        split: 'train' or 'test'.
    """

    def __init__(self, scans: Subset, digits_N4: np.ndarray, split: str):
        self.scans, self.digits_N4, self.split = scans, digits_N4, split
        self.classes = labelled(NAMES)
        rng = np.random.default_rng(list(GRIDS).index(split))
        labels_M = np.array([scans[i]['label'] for i in range(len(scans))])
        # The scans of digit d are order_M[start_C[d] : start_C[d] + count_C[d]].
        order_M, count_C = np.argsort(labels_M, kind='stable'), np.bincount(labels_M)
        start_C = np.cumsum(count_C) - count_C
        pick_N4 = (rng.random(digits_N4.shape) * count_C[digits_N4]).astype(int)
        self.scans_N4 = order_M[start_C[digits_N4] + pick_N4]
        self.corner_N = rng.integers(4, size=len(digits_N4))

    def __len__(self) -> int:
        return len(self.digits_N4)

    def __getitem__(self, index: int) -> Record:
        scans_KHWC = np.stack([self.scans[i]['image'] for i in self.scans_N4[index]])
        image_HWC = rearrange(scans_KHWC, '(Y X) H W C -> (Y H) (X W) C', Y=2)
        label = int(self.digits_N4[index, 0])
        return {'image': image_HWC, 'label': label, 'captions': self.captions(index)}

    def captions(self, index: int) -> list[str]:
        names = [NAMES[digit] for digit in self.digits_N4[index]]
        a, b, c, d = names
        full = [f'{a} and {b} above {c} and {d}', f'top row {a} {b}, bottom row {c} {d}']
        if self.split == 'test':
            return full
        corner = self.corner_N[index]
        return [*full, f'a {names[corner]} at the {CORNERS[corner]}']

    def describe(self, index: int) -> str:
        return f'{self.split} grids[{index}]'


def _table() -> np.ndarray:
    """[1797, 65] float64: 64 pixels and the label."""
    # The file that load_digits reads: importing sklearn.datasets is slow.
    spec = importlib.util.find_spec('sklearn')
    folder = os.path.dirname(spec.origin) if spec and spec.origin else ''
    path = os.path.join(folder, 'datasets', 'data', 'digits.csv.gz')
    if os.path.isfile(path):
        with gzip.open(path, 'rt') as file:
            return np.loadtxt(file, delimiter=',')
    from sklearn.datasets import load_digits

    pixels_NC, labels_N = load_digits(return_X_y=True)
    return np.concatenate([pixels_NC, labels_N[:, None]], axis=1)


def make(argument: str = '', root: str = '', holdout: float = 0.1) -> dict[str, Source]:
    """A fixed split, stratified by class: 1,297 for training, 500 for testing, or their grids.

    Args:
        argument: '' for the scans, 'grids'.
        root, holdout: not used: the data are embedded and the split is fixed.

    Raises:
        UserError: another argument.
    """
    del root, holdout
    if argument not in ('', 'grids'):
        raise UserError(
            f"config.data.source: 'digits' takes nothing after ':', got {argument!r}; or 'grids', "
            'four digits an image, with captions.'
        )
    digits = Digits()
    # Every 1797/500-th record of the records sorted by class, in random order within a class.
    order = np.random.default_rng(0).permutation(len(digits))
    order = order[np.argsort(digits.labels_N[order], kind='stable')]
    test = order[np.arange(TEST) * len(order) // TEST]
    train = np.setdiff1d(order, test)
    splits = {
        'train': Subset(digits, train.tolist()),
        'test': Subset(digits, np.sort(test).tolist()),
    }
    if not argument:
        return dict(splits)
    numbers_N = np.random.default_rng(0).permutation(10**4)
    digits_N4 = numbers_N[:, None] // [1000, 100, 10, 1] % 10
    train_N4, test_N4, _ = np.split(digits_N4, [GRIDS['train'], sum(GRIDS.values())])
    return {
        'train': Grids(splits['train'], train_N4, 'train'),
        'test': Grids(splits['test'], test_N4, 'test'),
    }
