"""Recordings to shar shards: samples to FLAC, texts to supervisions; `zipformer_crctc.sharwriter` writes the files.

The same recordings give the same bytes. FLAC is encoded by libsndfile, so no torchaudio is needed; lhotse's
`CutSet.from_shar` reads the result.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from zipformer_crctc.sharwriter import cuts_name, open_shard, recording_name

SAMPLING_RATE = 16_000
INT16_SCALE = 32_768


@dataclass(frozen=True)
class Recording:
    """One utterance to be written."""

    id: str
    audio: np.ndarray
    """float32 mono samples in [-1, 1), shape (num_samples,), at 16 kHz"""
    text: str
    language: str = ""
    speaker: str = ""
    alignment: tuple[tuple[str, float, float], ...] = ()
    """(phone, start in seconds, duration in seconds), in the order of time"""
    custom: Mapping[str, Any] = field(default_factory=dict)
    """anything JSON can hold; kept as the supervision's custom fields"""


@dataclass
class ShardStats:
    """What one call of write_shard made."""

    number: int
    cuts: int = 0
    seconds: float = 0.0
    clipped: int = 0
    """recordings with samples outside [-1, 1), which were cut off at full scale"""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(id, reason) of each recording that could not be written"""


def clear_shards(folder: Path) -> None:
    """Remove the shards of an earlier run, so that none stays beside fewer new ones."""
    for name in (cuts_name(0), recording_name(0)):
        for path in folder.glob(name.replace("0", "[0-9]")):
            path.unlink()


def write_shard(recordings: Iterable[Recording], folder: Path, number: int) -> ShardStats:
    """Write one shard of `folder`, replacing an older one of the same number.

    The shard is written whole or not at all. A recording without samples, or with NaN or infinity in them, is skipped
    and named in the result.

    Raises ValueError for an id that is used twice or that cannot be a file name, and for audio of another shape.
    """
    stats = ShardStats(number)
    seen: set[str] = set()
    with open_shard(folder, number) as add:
        for recording in recordings:
            _check(recording, seen)
            reason = _unusable(recording.audio)
            if reason:
                stats.skipped.append((recording.id, reason))
                continue
            flac, clipped = _encode_flac(recording.audio)
            cut = _cut_manifest(recording)
            add(cut, flac)
            stats.cuts += 1
            stats.seconds += cut["duration"]
            stats.clipped += clipped
    return stats


def _check(recording: Recording, seen: set[str]) -> None:
    if not recording.id or "/" in recording.id or "\0" in recording.id or recording.id in (".", ".."):
        raise ValueError(
            f"recording id {recording.id!r} cannot be a member name of a tar: use letters, digits, - and _"
        )
    if recording.id in seen:
        raise ValueError(f"recording id {recording.id!r} is used twice in one shard: ids must be unique")
    seen.add(recording.id)
    if recording.audio.ndim != 1:
        raise ValueError(
            f"recording {recording.id!r}: audio has shape {recording.audio.shape}, expected (num_samples,)"
        )


def _unusable(audio: np.ndarray) -> str:
    if audio.size == 0:
        return "no samples"
    if not np.isfinite(audio).all():
        return "NaN or infinity in the audio"
    return ""


def _encode_flac(audio: np.ndarray) -> tuple[bytes, bool]:
    """Encode (num_samples,) float audio as 16-bit FLAC; also tell whether it went beyond full scale."""
    scaled = np.rint(audio.astype(np.float64) * INT16_SCALE)
    # One step of rounding at the very top is no clipping that anyone hears.
    clipped = bool(scaled.max() > INT16_SCALE or scaled.min() < -INT16_SCALE)
    buffer = io.BytesIO()
    samples = scaled.clip(-INT16_SCALE, INT16_SCALE - 1).astype(np.int16)
    soundfile.write(buffer, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), clipped


def _recording_manifest(recording: Recording) -> dict[str, Any]:
    num_samples = int(recording.audio.shape[0])
    return {
        "id": recording.id,
        "sources": [{"type": "shar", "channels": [0], "source": ""}],
        "sampling_rate": SAMPLING_RATE,
        "num_samples": num_samples,
        "duration": num_samples / SAMPLING_RATE,
        "channel_ids": [0],
    }


def _cut_manifest(recording: Recording) -> dict[str, Any]:
    manifest = _recording_manifest(recording)
    supervision: dict[str, Any] = {
        "id": recording.id,
        "recording_id": recording.id,
        "start": 0.0,
        "duration": manifest["duration"],
        "channel": 0,
        "text": recording.text,
    }
    if recording.language:
        supervision["language"] = recording.language
    if recording.speaker:
        supervision["speaker"] = recording.speaker
    if recording.custom:
        supervision["custom"] = dict(recording.custom)
    if recording.alignment:
        # lhotse's AlignmentItem: symbol, start, duration, score.
        supervision["alignment"] = {
            "phone": [
                [phone, round(start, 6), round(duration, 6), None] for phone, start, duration in recording.alignment
            ]
        }
    return {
        "id": recording.id,
        "start": 0.0,
        "duration": manifest["duration"],
        "channel": 0,
        "supervisions": [supervision],
        "recording": manifest,
        "type": "MonoCut",
    }
