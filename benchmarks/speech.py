"""Utterances of a shar folder, for benchmarks that use speech."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zipformer_crctc.loader import AudioReader, build_eval_loader


def utterances(folder: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Samples (S,) at 16 kHz and text of each, ordered by id; audio is read as it is asked for."""
    loader, read = build_eval_loader([folder], num_workers=0), AudioReader()
    found = [utterance for request in loader.order.epoch(1, 0) for utterance in request.utterances]
    for utterance in sorted(found, key=lambda utterance: utterance.id):
        yield read(utterance), utterance.text
