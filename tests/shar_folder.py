"""Small shar folders for tests, written without lhotse."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16_000


def tone(seconds: float, seed: int = 0) -> np.ndarray:
    """A noisy tone, float32; seconds are rounded to samples."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 1000) * time) + 0.05 * rng.standard_normal(len(time))
    return wave.astype(np.float32)


def flac(samples: np.ndarray, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def cut(utterance_id: str, num_samples: int, text: str | None = "aba", **supervision: Any) -> dict[str, Any]:
    """A manifest entry as lhotse writes it; ``text=None`` leaves the supervision out."""
    duration = num_samples / RATE
    fields = {
        "id": utterance_id,
        "recording_id": utterance_id,
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "text": text,
        **supervision,
    }
    return {
        "id": utterance_id,
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "supervisions": [] if text is None else [fields],
        "recording": {
            "id": utterance_id,
            "sources": [{"type": "shar", "channels": [0], "source": ""}],
            "sampling_rate": RATE,
            "num_samples": num_samples,
            "duration": duration,
            "channel_ids": [0],
        },
        "type": "MonoCut",
    }


def write_shard(folder: Path, number: int, cuts: Sequence[dict[str, Any]], audio: Sequence[tuple[str, bytes]]) -> None:
    """One shard of manifest entries and tar members (name, data); a `.json` member follows each audio member."""
    recordings = {entry["id"]: json.dumps(entry["recording"]).encode() for entry in cuts}
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"cuts.{number:06d}.jsonl.gz", "wt", encoding="utf-8") as file:
        for entry in cuts:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    with tarfile.open(folder / f"recording.{number:06d}.tar", "w") as archive:
        for name, data in audio:
            stem = name.rpartition(".")[0]
            for member, content in ((name, data), (f"{stem}.json", recordings[stem])):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_folder(folder: Path, durations: Sequence[float], per_shard: int = 10, prefix: str = "utt") -> list[str]:
    """A folder of utterances of these seconds; returns their ids. All of one length share one recording."""
    encoded: dict[float, bytes] = {}
    ids = [f"{prefix}-{i:04d}" for i in range(len(durations))]
    for start in range(0, len(ids), per_shard):
        cuts, audio = [], []
        for utterance_id, seconds in list(zip(ids, durations, strict=True))[start : start + per_shard]:
            if seconds not in encoded:
                encoded[seconds] = flac(tone(seconds, seed=len(encoded)))
            cuts.append(cut(utterance_id, round(seconds * RATE), language="xx", speaker="s1"))
            audio.append((f"{utterance_id}.flac", encoded[seconds]))
        write_shard(folder, start // per_shard, cuts, audio)
    return ids
