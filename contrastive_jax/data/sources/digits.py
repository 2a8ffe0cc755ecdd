"""scikit-learn's handwritten digits: 1,797 real scans of 8 × 8 pixels, embedded, no download."""

import gzip
import importlib.util
import os

import numpy as np

from contrastive_jax.data import Record, Source, Subset, reject_argument

TEST = 500


class Digits:
    """All 1,797 digits, grey in 3 equal channels."""

    def __init__(self) -> None:
        table_NC = _table()
        # The scans have 17 levels, 0..16.
        grey_NHW = np.round(table_NC[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        self.images_NHWC = np.repeat(grey_NHW[..., None], 3, axis=-1)
        self.labels_N = table_NC[:, 64].astype(np.int32)
        self.classes = [str(d) for d in range(10)]

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> Record:
        return {'image': self.images_NHWC[index], 'label': int(self.labels_N[index])}

    def describe(self, index: int) -> str:
        return f'digits[{index}]'


def _table() -> np.ndarray:
    """[1797, 65] float64: 64 pixels and the label."""
    # The file that load_digits reads. Importing sklearn.datasets costs 1 to 2 s of start-up time.
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
    """A fixed split, stratified by class: 1,297 for training, 500 for testing.

    `root` and `holdout` are not used: the data are embedded and the split is fixed.
    """
    del root, holdout
    reject_argument(argument, 'digits')
    digits = Digits()
    # Every 1797/500-th record of the records sorted by class, in random order within a class.
    order = np.random.default_rng(0).permutation(len(digits))
    order = order[np.argsort(digits.labels_N[order], kind='stable')]
    test = order[np.arange(TEST) * len(order) // TEST]
    train = np.setdiff1d(order, test)
    return {
        'train': Subset(digits, train.tolist()),
        'test': Subset(digits, np.sort(test).tolist()),
    }
