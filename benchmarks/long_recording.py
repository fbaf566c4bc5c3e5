"""Windowed transcription of a long recording against the same speech utterance by utterance.

    python benchmarks/long_recording.py --model exp/espeak --data-config data/espeak/data.yaml --minutes 30

Utterances of a set are joined, with short silences between them, to a recording of the length asked for (again from the
first when all are used). Its transcription is scored against the joined references, and so are the utterances one by
one. Exit status 1 if the PERs differ by more than --tolerance points.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.features import SAMPLING_RATE
from zipformer_crctc.loader import AudioReader, build_eval_loader
from zipformer_crctc.metrics import edit_distance
from zipformer_crctc.text import normalise
from zipformer_crctc.transcriber import PhoneRecognizer


def utterances(data_config: Path, name: str) -> list[tuple[np.ndarray, str]]:
    """Samples and text of every utterance of a set, or of the first set of a kind."""
    sets = load_data_config(data_config)
    known = {**sets.dev, **sets.test, **{kind: next(iter(getattr(sets, kind).values())) for kind in ("dev", "test")}}
    loader, read = build_eval_loader([known[name]], num_workers=0), AudioReader()
    chosen = [utterance for request in loader.order.epoch(1, 0) for utterance in request.utterances]
    return [(read(utterance), utterance.text) for utterance in sorted(chosen, key=lambda utterance: utterance.id)]


def joined(parts: list[np.ndarray], gap: float) -> np.ndarray:
    """One recording, with so many seconds of faint noise before each part."""
    rng = np.random.default_rng(0)
    pieces: list[np.ndarray] = []
    for part in parts:
        pieces += [1e-4 * rng.standard_normal(round(gap * SAMPLING_RATE)).astype(np.float32), part]
    return np.concatenate(pieces)


def repeated(items: list[tuple[np.ndarray, str]], seconds: float) -> Iterator[tuple[np.ndarray, str]]:
    """The items over and over, until they last so long."""
    while True:
        for samples, text in items:
            yield samples, text
            seconds -= len(samples) / SAMPLING_RATE
            if seconds <= 0:
                return


def rate(references: list[list[str]], hypotheses: list[list[str]]) -> float:
    """PER in percent."""
    errors = sum(edit_distance(ref, hyp) for ref, hyp in zip(references, hypotheses, strict=True))
    return 100.0 * errors / sum(map(len, references))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--iter", type=int, default=0)
    parser.add_argument("--avg", type=int, default=1)
    parser.add_argument("--data-config", type=Path, required=True)
    parser.add_argument("--test-set", default="test", help="a set of the data config, or dev or test for the first one")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--gap", type=float, default=0.2, help="seconds of silence between utterances")
    parser.add_argument("--window", type=float, default=30.0)
    parser.add_argument("--overlap", type=float, default=4.0)
    parser.add_argument("--tolerance", type=float, default=0.5, help="points of PER")
    args = parser.parse_args()
    recognizer = PhoneRecognizer.from_pretrained(
        args.model, iter=args.iter, avg=args.avg, window=args.window, overlap=args.overlap
    )
    tokenizer = recognizer.recogniser.tokenizer
    chosen = list(repeated(utterances(args.data_config, args.test_set), 60 * args.minutes))
    references = [tokenizer.phones(tokenizer.encode(normalise(text, tokenizer.pieces))) for _, text in chosen]
    whole = joined([samples for samples, _ in chosen], args.gap)
    started = time.monotonic()
    (long,) = recognizer.transcribe(whole)
    middle = time.monotonic()
    single = recognizer.transcribe([samples for samples, _ in chosen])
    ended = time.monotonic()
    flat = [phone for reference in references for phone in reference]
    by_window = rate([flat], [long.phones])
    by_utterance = rate(references, [result.phones for result in single])
    print(f"{len(chosen)} utterances, {long.duration:.0f} s, {torch.get_num_threads()} threads")
    print(f"one recording, windows of {args.window:g} s: PER {by_window:.2f} %, {middle - started:.1f} s")
    print(f"utterance by utterance:     PER {by_utterance:.2f} %, {ended - middle:.1f} s")
    print(f"difference: {by_window - by_utterance:+.2f} points")
    return int(abs(by_window - by_utterance) > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
