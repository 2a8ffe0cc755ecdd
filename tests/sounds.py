"""Recordings for the tests of audio: who says what can be heard in their spectra."""

import io
import pathlib
import wave

import numpy as np
from scipy.io import wavfile

RATE = 8000
SPEAKERS = {'ann': 110.0, 'bob': 160.0, 'eve': 230.0}  # pitch, Hz
DIGITS = {'0': 600.0, '1': 1800.0}  # what the mouth lets through, Hz


def spoken(digit, speaker, seed=0, rate=RATE):
    """[T] float in [-1, 1]: harmonics of the speaker's pitch, the digit's loudest; 0.2 to 0.5 s."""
    rng = np.random.default_rng([seed, *digit.encode(), *speaker.encode()])
    seconds, pitch = rng.uniform(0.2, 0.5), SPEAKERS[speaker] * rng.uniform(0.97, 1.03)
    t = np.arange(round(seconds * rate)) / rate
    hz = pitch * np.arange(1, int(3500 / pitch))
    level = np.exp(-(((hz - DIGITS[digit]) / 400) ** 2)) + 0.02
    x = (
        level[:, None] * np.sin(2 * np.pi * hz[:, None] * t + rng.uniform(0, 6, len(hz))[:, None])
    ).sum(0)
    x = x * np.sin(np.pi * np.arange(len(t)) / len(t)) + 0.01 * rng.standard_normal(len(t))
    return rng.uniform(0.2, 0.9) * x / np.abs(x).max()


def wav(x, rate=RATE):
    """A WAV file of samples of any kind that SciPy writes."""
    file = io.BytesIO()
    wavfile.write(file, rate, x)
    return file.getvalue()


def wav24(x_int32, rate=RATE):
    """A WAV file of the upper 24 bits."""
    file = io.BytesIO()
    with wave.open(file, 'wb') as out:
        out.setnchannels(1)
        out.setsampwidth(3)
        out.setframerate(rate)
        out.writeframes(x_int32.astype('<i4').view(np.uint8).reshape(-1, 4)[:, 1:].tobytes())
    return file.getvalue()


def int16(x):
    return np.rint(x * 32767).astype(np.int16)


def make_folder(root, count=4, folder='', seed=0):
    """`count` files of each digit and speaker, named as those of the Free Spoken Digit Dataset."""
    place = pathlib.Path(root) / folder
    place.mkdir(parents=True, exist_ok=True)
    for digit in DIGITS:
        for speaker in SPEAKERS:
            for i in range(count):
                content = wav(int16(spoken(digit, speaker, seed + i)))
                (place / f'{digit}_{speaker}_{i}.wav').write_bytes(content)
    return root
