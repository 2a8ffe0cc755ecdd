"""Recordings: random windows of them for training, the one in the middle for evaluation.

Hosts ship int16; networks see floats in [-1, 1).

Dimension key: B batch, V views, T samples of a window, n frames, F frequencies, M bands, S parts.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from contrastive_jax import figures
from contrastive_jax.config import check_range
from contrastive_jax.data import BadRecord, Record, sound
from contrastive_jax.inputs import Batch, Inputs, Row, Transform

FRAME = 0.032  # seconds of a frame, each of which begins in the middle of the one before
BANDS, SEGMENTS = 40, 4
FLOOR = 1e-5  # of the loudest band of a window: 50 dB below it nothing is heard


def make(*, rate: int, seconds: float, views: int = 1) -> Inputs:
    """Records with 'wave' [any] int16 and its 'rate' in Hz.

    A training batch has 'views' [B, V, T], an evaluation batch 'wave' [B, T]. A recording of
    another rate is resampled. One that is shorter than a window has zeros around it: for evaluation
    as many before as behind, in training at random.

    Args:
        rate: of the windows, Hz.
        seconds: T / rate, to the nearest sample.
        views: V, random windows of each recording.

    Raises:
        UserError: an option out of range.
    """
    where = 'config.inputs'
    check_range(where, {'rate': rate}, least=1000, whole=True)
    check_range(where, {'seconds': seconds}, least=0.1)
    check_range(where, {'views': views}, least=1, whole=True)
    length = round(rate * seconds)

    def training(count: int) -> Transform:
        def host(record: Record, rng: np.random.Generator) -> Row:
            wave = resampled(record['wave'], record['rate'], rate)
            spare = len(wave) - length
            starts = rng.integers(min(spare, 0), max(spare, 0), count, endpoint=True)
            return {'views': np.stack([window(wave, start, length) for start in starts])}

        return _transform(host, 'views', (count, length))

    def middle(record: Record, rng: Any) -> Row:
        del rng
        wave = resampled(record['wave'], record['rate'], rate)
        return {'wave': window(wave, (len(wave) - length) // 2, length)}

    def given(item: Any) -> Record:
        if isinstance(item, (str, os.PathLike)):
            wave, own = sound.read(item)
            return {'wave': wave, 'rate': own}
        return {'wave': samples(item), 'rate': rate}

    def show(batch: Batch) -> bytes:
        views_BVT = np.asarray(batch['views'])
        heard = np.asarray(loudness(views_BVT.reshape(-1, length), rate))
        drawn = np.stack([figures.heat(x_nM.T[::-1]) for x_nM in heard])
        return figures.views_grid(drawn.reshape(*views_BVT.shape[:2], *drawn.shape[1:]))

    return Inputs(
        train=training(views),
        eval=_transform(middle, 'wave', (length,)),
        tune=training(1),
        baseline=lambda batch: log_power(batch['wave'], rate),
        reads=('wave', 'rate'),
        record=given,
        show=show,
    )


def _transform(host: Callable[..., Row], name: str, shape: tuple[int, ...]) -> Transform:
    def device(key: Any, batch: Batch) -> Batch:
        del key
        return {**batch, name: batch[name].astype(jnp.float32) / 32768}

    return Transform(host, {name: jax.ShapeDtypeStruct(shape, jnp.int16)}, device)


def resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples at another rate, int16."""
    if rate == wanted:
        return wave
    from scipy.signal import resample_poly

    logging.log_first_n(logging.INFO, 'recordings at %d Hz are resampled to %d', 1, rate, wanted)
    shared = math.gcd(rate, wanted)
    return sound.int16(resample_poly(wave / 32768, wanted // shared, rate // shared))


def window(wave: np.ndarray, start: int, length: int) -> np.ndarray:
    """`length` samples from `start`, which may be negative; zeros where there are none."""
    inside = wave[max(start, 0) : max(start + length, 0)]
    before = min(max(-start, 0), length)
    return np.pad(inside, (before, length - before - len(inside)))


def samples(wave: Any) -> np.ndarray:
    """A user's recording as [samples] int16.

    Raises:
        BadRecord: neither int16 nor floats from -1 to 1, or not of one dimension.
    """
    wave = np.asarray(wave)
    if wave.ndim != 1 or not wave.size or (wave.dtype != np.int16 and wave.dtype.kind != 'f'):
        got = f'{wave.dtype} {list(wave.shape)}'
        raise BadRecord(f'got {got}, expected [samples] in int16, or in floats from -1 to 1.')
    if wave.dtype == np.int16:
        return wave
    # What a filter or a codec has made a little louder is clipped.
    if (most := np.abs(wave).max()) > 2:
        raise BadRecord(f'got floats up to {most:g}, expected -1 to 1.')
    return sound.int16(wave)


def log_power(wave_BT: jax.Array, rate: int) -> jax.Array:
    """[B, S · M]: `loudness` averaged over S equal parts of the window, less its own mean.

    Cosines of numbers that are all positive say little.
    """
    heard_BnM = loudness(wave_BT, rate)
    parts = np.array_split(np.eye(heard_BnM.shape[1], dtype=np.float32), SEGMENTS)
    mean_Sn = np.stack([part.mean(0) for part in parts])
    x_BSM = jnp.einsum('sn,bnm->bsm', mean_Sn, heard_BnM, precision='highest')
    x_BD = x_BSM.reshape(len(wave_BT), -1)
    return x_BD - x_BD.mean(1, keepdims=True)


def loudness(wave_BT: jax.Array | np.ndarray, rate: int) -> jax.Array:
    """[B, n, M]: log(1 + power / (FLOOR · the largest of the window)), from 0, in mel bands.

    The power spectrum of frames of 32 ms under Hann's window, which overlap by half, in M
    triangular bands equally spaced in mel, 2595 log10(1 + Hz / 700), from 0 to rate / 2. How loud a
    recording is as a whole changes nothing.
    """
    frame = round(FRAME * rate)
    starts_n = np.arange(0, wave_BT.shape[1] - frame + 1, frame // 2)
    hann = np.hanning(frame + 1)[:-1].astype(np.float32)
    frames_BnT = jnp.asarray(wave_BT)[:, starts_n[:, None] + np.arange(frame)[None, :]]
    power_BnF = jnp.abs(jnp.fft.rfft(frames_BnT * hann[None, None, :])) ** 2
    power_BnM = jnp.matmul(power_BnF, bands(frame, rate), precision='highest')
    largest_B11 = power_BnM.max((1, 2), keepdims=True)
    return jnp.log1p(power_BnM / jnp.where(largest_B11 > 0, FLOOR * largest_B11, 1.0))


def bands(frame: int, rate: int) -> np.ndarray:
    """[F, M] float32: triangles over the frequencies of a frame, 1 at their middles."""
    mel = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), BANDS + 2)
    hz = 700 * (10 ** (mel / 2595) - 1)
    step = rate / frame
    # At low rates mel bands would fall between two frequencies: none is narrower than their step.
    low_M, high_M = np.minimum(hz[:-2], hz[1:-1] - step), np.maximum(hz[2:], hz[1:-1] + step)
    hz_F1 = (np.arange(frame // 2 + 1) * step)[:, None]
    up_FM = (hz_F1 - low_M[None]) / (hz[1:-1] - low_M)[None]
    down_FM = (high_M[None] - hz_F1) / (high_M - hz[1:-1])[None]
    return np.maximum(0, np.minimum(up_FM, down_FM)).astype(np.float32)
