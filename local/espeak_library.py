"""Speech and its phones from the espeak-ng library, by ctypes.

espeak-ng (https://github.com/espeak-ng/espeak-ng) is GPL-3 software. Nothing of it is part of this project: the
PyPI package `espeakng-loader` ships the shared library with its data, and it is used as a separate library to make
data. The structures and constants below follow its public header `speak_lib.h`.

The library is one global state per process, and that state (phase of the vocal flutter, echo buffer, noise generator)
leaks from one utterance into the next. The same calls with the same seed in a fresh process give the same samples; the
same call twice does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_PHONEME_EVENTS = 0x0001
INITIALIZE_PHONEME_IPA = 0x0002
INITIALIZE_DONT_EXIT = 0x8000
CHARS_UTF8 = 1
POSITION_CHARACTER = 1
EVENT_LIST_TERMINATED = 0
EVENT_PHONEME = 7
PARAMETER_RATE, PARAMETER_VOLUME, PARAMETER_PITCH, PARAMETER_RANGE = 1, 2, 3, 4
EVENT_NAME_BYTES = 8
VOLUME = 50  # of 200; at the library's own 100 some voices clip
BUFFER_MS = 1000


class EspeakError(ValueError):
    """The espeak-ng library is missing or refused a call."""


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        # c_uint8, not c_char: ctypes would cut the value at its first zero byte, and a full name has none.
        ("name", ctypes.c_uint8 * EVENT_NAME_BYTES),
    )


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)  # fmt: skip


@dataclass(frozen=True)
class PhonemeEvent:
    """One phoneme as espeak-ng names it: a phone, a diphthong, an affricate, a pause ('') or a language mark '(en)'."""

    ipa: str
    start: int
    """first sample"""
    full: bool
    """the name fills its eight bytes, so its end may be lost"""


@dataclass(frozen=True)
class Prosody:
    """How an utterance is spoken."""

    rate: int = 175
    """words per minute, 80 to 450"""
    pitch: int = 50
    """0 to 99; 50 is the voice's own"""
    pitch_range: int = 50
    """0 (monotone) to 99; 50 is the voice's own"""


@dataclass(frozen=True)
class Speech:
    """What the library made of a text."""

    samples: np.ndarray
    """int16, shape (num_samples,), at Espeak.sampling_rate"""
    events: tuple[PhonemeEvent, ...]


class Espeak:
    """The library of this process. Make it once per process; see the note on its state at the top of this file."""

    sampling_rate: int
    """samples per second, 22050"""
    version: str

    def __init__(self, seed: int) -> None:
        """Load and start the library. Raises EspeakError where it is missing or has no data.

        seed: of the noise in breathy voices, which the library would seed by the time.
        """
        library, data = _locate()
        self._library = ctypes.CDLL(str(library))
        self._declare()
        options = INITIALIZE_PHONEME_EVENTS | INITIALIZE_PHONEME_IPA | INITIALIZE_DONT_EXIT
        rate = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, BUFFER_MS, str(data).encode(), options)
        if rate <= 0:
            raise EspeakError(f"espeak-ng did not start with the data in {data}: reinstall espeakng-loader")
        self._library.espeak_ng_SetRandSeed(seed)
        self.sampling_rate = rate
        self.version = self._library.espeak_Info(None).decode()
        self.variants = frozenset(path.name for path in (data / "voices" / "!v").iterdir())
        self._chunks: list[bytes] = []
        self._events: list[PhonemeEvent] = []
        # A reference must live as long as the library calls it.
        self._callback = _CALLBACK(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _declare(self) -> None:
        library = self._library
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_ng_SetRandSeed.restype = None
        library.espeak_Info.restype = ctypes.c_char_p
        library.espeak_Info.argtypes = [ctypes.c_void_p]
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]

    def _receive(self, samples: Sequence[int] | None, count: int, events: Sequence[_Event]) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))  # type: ignore[arg-type]
        index = 0
        while events[index].type != EVENT_LIST_TERMINATED:
            event = events[index]
            if event.type == EVENT_PHONEME:
                name = bytes(event.name)
                # A name cut inside a letter loses that letter; `full` tells that it may have.
                text = name.split(b"\0")[0].decode("utf-8", errors="ignore")
                self._events.append(PhonemeEvent(text, event.sample, full=0 not in name))
            index += 1
        return 0

    def speak(self, text: str, voice: str, variant: str, prosody: Prosody) -> Speech:
        """Synthesise `text` by the voice of a language and a variant of it ("m3").

        Raises EspeakError for a voice or a variant that the library does not have (it would ignore the latter).
        """
        if variant not in self.variants:
            raise EspeakError(f"espeak-ng {self.version} has no voice variant {variant!r}")
        if self._library.espeak_SetVoiceByName(f"{voice}+{variant}".encode()) != 0:
            raise EspeakError(f"espeak-ng {self.version} has no voice {voice!r}")
        self._library.espeak_SetParameter(PARAMETER_VOLUME, VOLUME, 0)
        self._library.espeak_SetParameter(PARAMETER_RATE, prosody.rate, 0)
        self._library.espeak_SetParameter(PARAMETER_PITCH, prosody.pitch, 0)
        self._library.espeak_SetParameter(PARAMETER_RANGE, prosody.pitch_range, 0)
        self._chunks.clear()
        self._events.clear()
        data = text.encode() + b"\0"
        status = self._library.espeak_Synth(data, len(data), 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None)
        if status != 0:
            raise EspeakError(f"espeak-ng returned {status} for the text {text!r}")
        return Speech(np.frombuffer(b"".join(self._chunks), dtype=np.int16), tuple(self._events))


def _locate() -> tuple[Path, Path]:
    try:
        import espeakng_loader
    except ImportError as error:
        raise EspeakError(
            "the package espeakng-loader, which ships espeak-ng, is not installed: pip install espeakng-loader"
        ) from error
    return Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())
