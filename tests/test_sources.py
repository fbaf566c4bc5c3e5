"""What inputs name."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from zipformer_crctc.sources import ArrayStream, find_sources


def test_files_folders_patterns_and_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.wav", "in/a.MP3", "in/deep/a.flac", "in/notes.txt", "in/x[1].wav", "one.bin"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    caplog.set_level(logging.INFO)
    found = find_sources(
        ["one.bin", "in", "in/*.wav", Path("missing.wav"), "-", np.zeros(3), "no/*.wav", "in/x[1].wav"]
    )
    assert [(source.id, source.audio) for source in found] == [
        ("one", "one.bin"),
        ("a", "in/a.MP3"),
        ("b", "in/b.wav"),
        ("deep/a", "in/deep/a.flac"),
        ("x[1]", "in/x[1].wav"),
        ("b-2", "in/b.wav"),
        ("x[1]-2", "in/x[1].wav"),
        ("missing", "missing.wav"),
        ("stdin", "-"),
        ("array-5", ""),
        ("x[1]-3", "in/x[1].wav"),
    ]
    assert "1 x .txt" in caplog.text and "no/*.wav: nothing fits" in caplog.text


def test_arrays_are_mixed_and_scaled() -> None:
    stereo = np.array([[32767, 0], [-32768, 0]] * 50, dtype=np.int16)
    assert np.concatenate(list(ArrayStream(stereo)))[:2].tolist() == pytest.approx([0.5, -0.5], abs=1e-4)
    assert np.concatenate(list(ArrayStream(stereo, channel=1)))[:2].tolist() == pytest.approx([1, -1], abs=1e-4)
    assert len(np.concatenate(list(ArrayStream(np.zeros(8000), 8000)))) == 16_000
    with pytest.raises(ValueError, match="sampling_rate: 0"):
        ArrayStream(stereo, 0)
