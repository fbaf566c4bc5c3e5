"""Tables of audio files."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch

from shar_folder import RATE, tone
from zipformer_crctc.audiotable import read_audio_table, table_batches
from zipformer_crctc.features import Fbank
from zipformer_crctc.shar import Skipped


def write_table(folder: Path, *lines: str) -> Path:
    path = folder / "table.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_and_what_is_skipped(tmp_path: Path) -> None:
    table = write_table(
        tmp_path, "audio\ttext\tlanguage", "x/a.wav\ta b\txx", "x/a.wav\tb\t", "c.flac\t\txx", "\tb\t", "d.wav\tb"
    )
    skipped = Skipped(max_examples=None)
    rows = read_audio_table(table, skipped)
    assert [(row.id, row.text, row.language) for row in rows] == [
        ("x/a", "a b", "xx"),
        ("x/a-2", "b", ""),
        ("c", "", "xx"),
    ]
    assert rows[0].audio == tmp_path / "x" / "a.wav"
    assert skipped.counts == {"no audio": 1, "another number of cells than the header's 3": 1}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("audio", "a.wav"), "has no column text"),
        (("audio\ttext",), "has no rows"),
        (("audio\ttext\ttext", "a\tb\tc"), "text 2 times"),
    ],
)
def test_bad_tables(tmp_path: Path, lines: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_audio_table(write_table(tmp_path, *lines), Skipped())


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.tsv does not exist"):
        read_audio_table(tmp_path / "absent.tsv", Skipped())


def test_batches_hold_every_file_once_and_name_what_cannot_be_used(tmp_path: Path) -> None:
    for number, seconds in enumerate((1.0, 1.5, 0.5, 4.0)):
        soundfile.write(tmp_path / f"{number}.wav", tone(seconds), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", tone(0.05), RATE)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    names = [*(f"{number}.wav" for number in range(4)), "short.wav", "bad.wav", "absent.wav"]
    table = write_table(tmp_path, "audio\ttext", *(f"{name}\ta" for name in names))
    skipped = Skipped(max_examples=None)
    batches = list(table_batches(read_audio_table(table, skipped), 3.0, skipped))
    assert [[utterance.id for utterance in batch.utterances] for batch in batches] == [["1", "0"], ["2"], ["3"]]
    assert [batch.num_frames.tolist() for batch in batches] == [[150, 100], [50], [400]]
    assert batches[0].utterances[0].duration == 1.5
    expected = Fbank()(torch.from_numpy(tone(1.0)))
    torch.testing.assert_close(batches[0].features[1, :100], expected, atol=1e-5, rtol=0)
    assert skipped.total == 3
    assert skipped.counts["fewer than 9 feature frames"] == 1 and skipped.counts["no such file"] == 1
