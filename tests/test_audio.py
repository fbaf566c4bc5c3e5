from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from zipformer_crctc.audio import AudioError, load_audio


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_and_rates(tmp_path: Path, suffix: str, rate: int) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(rate), rate)
    audio, channels = load_audio(path)
    assert audio.dtype == np.float32
    assert channels == 1
    assert len(audio) == pytest.approx(16_000, abs=1200 if suffix == "mp3" else 2)
    middle = audio[4000:12_000]
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() * 16_000 / len(middle) == pytest.approx(440, abs=2)
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)


def test_channels_are_mixed_down_by_their_mean(tmp_path: Path) -> None:
    left, right = tone(16_000), tone(16_000, hertz=1000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    audio, channels = load_audio(tmp_path / "a.wav")
    assert channels == 2
    np.testing.assert_allclose(audio, (left + right) / 2, atol=1e-6)


def test_truncated_wav(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16_000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[:8000])
    with pytest.raises(AudioError, match=f"truncated: the wav header promises {len(whole)} bytes, the file has 8000"):
        load_audio(path)


def test_wav_written_to_a_pipe_promises_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16_000), 16_000)
    data = bytearray(path.read_bytes())
    position = data.index(b"data") + 4
    data[position : position + 4] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    assert len(load_audio(path)[0]) == 16_000


def test_truncated_flac(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 64_000), 16_000)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(AudioError, match=r"truncated|cannot be decoded"):
        load_audio(path)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"this is text", b"RIFF\x00\x00\x00\x00WAVE"])
def test_files_that_are_no_audio(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match="cannot be decoded"):
        load_audio(tmp_path / "a.wav")


def test_missing_file_no_samples_and_nan(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="no such file"):
        load_audio(tmp_path / "absent.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(AudioError, match="no samples"):
        load_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN"):
        load_audio(tmp_path / "nan.wav")
