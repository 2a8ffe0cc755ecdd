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

'digits:photographs' are images in colour, 32 × 32 pixels, 2,000 for training and 500 for testing:
a digit cut from one of the two photographs that come with scikit-learn, a palace in China and a
flower, and laid on the other one, each time on other places of both. Which is the digit's is drawn.
The photographs are cut, too: test images have places of their left two fifths, training images of
the rest; palace, trees, petals and leaves are on both sides. The label is the digit.
"""

import gzip
import importlib.util
import os
import pathlib

import numpy as np
from einops import rearrange

from contrastive_jax.config import UserError
from contrastive_jax.data import Record, Source, Subset, labelled
from contrastive_jax.data.decode import decode

TEST = 500
GRIDS = {'train': 8000, 'test': 1000}
PHOTOGRAPHS = {'train': 2000, 'test': 500}
SIDE = 32  # of images of digits on photographs, pixels
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


class OnPhotographs:
    """Digits of one photograph on another one, put together when they are asked for.

    Args:
        scans: the digits that they may use, each about as often.
        photographs: two, [H, W, 3] uint8.
        split: 'train' or 'test'.
    """

    def __init__(self, scans: Subset, photographs: list[np.ndarray], split: str):
        self.scans, self.photographs, self.split = scans, photographs, split
        self.classes = scans.classes

    def __len__(self) -> int:
        return PHOTOGRAPHS[self.split]

    def __getitem__(self, index: int) -> Record:
        from PIL import Image

        rng = np.random.default_rng([list(PHOTOGRAPHS).index(self.split), index])
        scan = self.scans[index % len(self.scans)]
        grey = Image.fromarray(scan['image'][..., 0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        share = np.asarray(grey)[..., None] / 255
        digit, ground = (self._place(rng, i) for i in rng.permutation(2))
        image = np.round(share * digit + (1 - share) * ground).astype(np.uint8)
        return {'image': image, 'label': scan['label']}

    def _place(self, rng: np.random.Generator, which: int) -> np.ndarray:
        x = self.photographs[which]
        row, column = (rng.integers(n - SIDE + 1) for n in x.shape[:2])
        return x[row : row + SIDE, column : column + SIDE]

    def describe(self, index: int) -> str:
        return f'{self.split} digits on photographs[{index}]'


def _photographs(split: str) -> list[np.ndarray]:
    """The split's part of both, a quarter as wide and as high as they are."""
    from PIL import Image

    found = []
    for name in ('china.jpg', 'flower.jpg'):
        whole = decode(pathlib.Path(_file('images', name)).read_bytes())
        x = np.asarray(Image.fromarray(whole).reduce(4))
        cut = x.shape[1] * 2 // 5
        found.append(x[:, cut:] if split == 'train' else x[:, :cut])
    return found


def _file(*names: str) -> str:
    """Path of a file among scikit-learn's data sets, whose import is slow."""
    spec = importlib.util.find_spec('sklearn')
    folder = os.path.dirname(spec.origin) if spec and spec.origin else ''
    return os.path.join(folder, 'datasets', *names)


def _table() -> np.ndarray:
    """[1797, 65] float64: 64 pixels and the label."""
    path = _file('data', 'digits.csv.gz')
    if os.path.isfile(path):
        with gzip.open(path, 'rt') as file:
            return np.loadtxt(file, delimiter=',')
    from sklearn.datasets import load_digits

    pixels_NC, labels_N = load_digits(return_X_y=True)
    return np.concatenate([pixels_NC, labels_N[:, None]], axis=1)


def make(argument: str = '', root: str = '', holdout: float = 0.1) -> dict[str, Source]:
    """A fixed split, stratified by class: 1,297 for training, 500 for testing, or images of them.

    Args:
        argument: '' for the scans, 'grids', 'photographs'.
        root, holdout: not used: the data are embedded and the split is fixed.

    Raises:
        UserError: another argument.
    """
    del root, holdout
    if argument not in ('', 'grids', 'photographs'):
        raise UserError(
            f"config.data.source: 'digits' takes nothing after ':', got {argument!r}; or 'grids', "
            "four digits an image, with captions, or 'photographs', digits in colour."
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
    if argument == 'photographs':
        return {name: OnPhotographs(x, _photographs(name), name) for name, x in splits.items()}
    numbers_N = np.random.default_rng(0).permutation(10**4)
    digits_N4 = numbers_N[:, None] // [1000, 100, 10, 1] % 10
    train_N4, test_N4, _ = np.split(digits_N4, [GRIDS['train'], sum(GRIDS.values())])
    return {
        'train': Grids(splits['train'], train_N4, 'train'),
        'test': Grids(splits['test'], test_N4, 'test'),
    }
