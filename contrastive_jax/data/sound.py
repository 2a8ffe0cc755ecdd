"""Sound files to samples: WAV by SciPy; FLAC and Ogg by libsndfile, with the [audio] extra.

The kind is told from the content, never from the file's name. Every failure is a BadRecord with the
reason. Safe to call from several threads.
"""

import importlib.util
import io
import warnings
from typing import Any

import numpy as np
from etils import epath

from contrastive_jax.data import BadRecord

SUFFIXES = ('.wav', '.flac', '.ogg')
INSTALL = "FLAC and Ogg need soundfile: pip install 'contrastive-jax[audio]'"
MAX_SAMPLES = 2**28  # of all channels: 1 GiB while they are float32
UNKNOWN_SIZE = 2**32 - 1  # in the header of a WAV file that was written to a pipe

# SciPy warns of chunks that hold no samples: dates, places, names.
warnings.filterwarnings('ignore', message=r'Chunk \(non-data\) not understood')


def has_soundfile() -> bool:
    """Whether FLAC and Ogg can be read."""
    return importlib.util.find_spec('soundfile') is not None


def read(path: Any) -> tuple[np.ndarray, int]:
    """The samples of a file, see `decode`.

    Raises:
        BadRecord: it cannot be opened, or not be decoded.
    """
    try:
        data = epath.Path(path).read_bytes()
    except OSError as error:
        raise BadRecord(f'unreadable: {error.strerror or error}') from error
    return decode(data)


def decode(data: bytes) -> tuple[np.ndarray, int]:
    """Decodes a sound file.

    WAV files may hold integers of 8 to 32 bits or floats. Channels are averaged.

    Args:
        data: the file's bytes.

    Returns:
        [T] int16, and the sampling rate in Hz.

    Raises:
        BadRecord: empty, of another kind, of a kind that needs soundfile where that is not
            installed, truncated, damaged or too long; samples that are not finite.
    """
    if not data:
        raise BadRecord('zero bytes')
    try:
        wave, rate = _wav(data) if data[:4] in (b'RIFF', b'RIFX') else _soundfile(data)
    except (BadRecord, MemoryError):
        raise
    except Exception as error:  # ValueError, struct.error, LibsndfileError, ...
        raise BadRecord(f'cannot be decoded: {error}') from error
    if not wave.size or rate < 1:
        raise BadRecord(f'{len(wave)} samples at {rate} Hz')
    if wave.dtype == np.int16 and wave.ndim == 1:
        return wave, int(rate)
    if wave.dtype == np.uint8:
        wave = (wave.astype(np.float64) - 128) / 128
    elif wave.dtype.kind == 'i':
        wave = wave / -float(np.iinfo(wave.dtype).min)
    return int16(wave if wave.ndim == 1 else wave.mean(1)), int(rate)


def int16(wave: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as int16, 32768 standing for 1; what is outside is clipped.

    Raises:
        BadRecord: NaN or infinite.
    """
    if not np.isfinite(wave).all():
        raise BadRecord('samples that are not finite')
    return np.rint(wave * 32768).clip(-32768, 32767).astype(np.int16)


def _wav(data: bytes) -> tuple[np.ndarray, int]:
    from scipy.io import wavfile

    order = 'little' if data[:4] == b'RIFF' else 'big'
    size = int.from_bytes(data[4:8], order)
    if size == UNKNOWN_SIZE:
        data = data[:4] + (len(data) - 8).to_bytes(4, order) + data[8:]
    elif size + 8 > len(data):
        raise BadRecord(f'truncated: {len(data)} of {size + 8} bytes')
    rate, wave = wavfile.read(io.BytesIO(data))
    return wave, rate


def _soundfile(data: bytes) -> tuple[np.ndarray, int]:
    if data[:4] not in (b'fLaC', b'OggS'):
        raise BadRecord(f'not a WAV, FLAC or Ogg file (starts with {data[:8]!r})')
    if not has_soundfile():
        raise BadRecord(INSTALL)
    import soundfile

    with soundfile.SoundFile(io.BytesIO(data)) as file:
        if file.frames * file.channels > MAX_SAMPLES:
            raise BadRecord(f'{file.frames} samples are more than the limit of {MAX_SAMPLES}')
        wave = file.read(dtype='float32')
        if len(wave) != file.frames:
            raise BadRecord(f'truncated: {len(wave)} of {file.frames} samples')
        return wave, file.samplerate
