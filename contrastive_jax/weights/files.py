"""Arrays in .safetensors and .npz files. Nothing is ever unpickled."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from contrastive_jax.config import UserError

SUFFIXES = ('.safetensors', '.npz')
PICKLES = ('.pt', '.pth', '.bin', '.ckpt', '.pkl', '.tar')


def is_file(path: str | os.PathLike) -> bool:
    """Whether a path means weights in a file, not a workdir.

    Raises:
        UserError: it is a pickle's name.
    """
    suffix = epath.Path(path).suffix.lower()
    if suffix in PICKLES and not epath.Path(path).is_dir():
        raise UserError(
            f'{os.fspath(path)}: a pickle can run any code when it is opened, so it is not. '
            'Convert it where you trust it: python -c "import torch; from safetensors.torch import '
            "save_file; s = torch.load('IN', map_location='cpu', weights_only=True); s = "
            "s.get('state_dict', s.get('model', s)); save_file({k: v.contiguous().clone() for k, v "
            "in s.items()}, 'OUT.safetensors')\""
        )
    return suffix in SUFFIXES


class File(Mapping[str, np.ndarray]):
    """Arrays by name, read one by one; `shapes` without reading any.

    Raises:
        UserError: no such file, a pickle, damaged, or neither of the two kinds.
    """

    def __init__(self, path: str | os.PathLike):
        self.origin, suffix = os.fspath(path), epath.Path(path).suffix.lower()
        if not epath.Path(path).is_file():
            raise UserError(f'{self.origin}: no such file.')
        self.metadata: Mapping[str, str] = {}
        self._get: Callable[[str], np.ndarray]
        self._rename: dict[str, str] = {}
        try:
            if suffix == '.npz':
                arrays = np.load(self.origin, allow_pickle=False)
                self.shapes, self._get = _npz_shapes(arrays), arrays.__getitem__
            else:
                import safetensors

                opened: Any = safetensors.safe_open(self.origin, 'np')
                self.metadata, self._get = opened.metadata() or {}, opened.get_tensor
                self.shapes = {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118
        except ImportError as error:
            raise UserError(f'{self.origin}: {error}: pip install safetensors') from error
        except Exception as error:  # safetensors', zipfile's and NumPy's own
            raise UserError(f'{self.origin}: cannot be read as {suffix}: {error}') from error

    def rename(self, change: Callable[[str], str | None]) -> int:
        """Other names; arrays whose name becomes None are left out, and counted."""
        there = {new: old for old in self.shapes if (new := change(old)) is not None}
        left_out = len(self.shapes) - len(there)
        self._rename = {new: self._rename.get(old, old) for new, old in there.items()}
        self.shapes = {new: self.shapes[old] for new, old in there.items()}
        return left_out

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return self._get(self._rename.get(name, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _npz_shapes(arrays: Any) -> dict[str, tuple[int, ...]]:
    found = {}
    for name in arrays.files:
        found[name] = arrays[name].shape  # an array of objects raises here
    return found


def digest(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()


def write(content: bytes, path: str | os.PathLike) -> None:
    """A file and its folder; whoever looks sees the old file or the new one, whole."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f'.{file.name}.tmp')
    temporary.write_bytes(content)
    temporary.replace(file)
