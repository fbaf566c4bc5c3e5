"""Transcription of a long recording against the same speech utterance by utterance.

    python benchmarks/long_recording.py --model exp/espeak --data-config data/espeak/data.yaml --gaps 0.3,3 --snrs 60,20

Utterances of a set are joined to a recording of the length asked for (again from the first when all are used), with
gaps of up to twice a mean length before them and pink noise over all. Its transcription is scored against the joined
references, and so are the utterances one by one, cut out of the same noisy recording. Writes rows to
benchmarks/results/long_recording.json; exit status 1 if any two PERs differ by more than --tolerance points.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks.results_file import result_path, row, write_rows
from benchmarks.speech import utterances
from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.features import SAMPLING_RATE
from zipformer_crctc.metrics import edit_distance
from zipformer_crctc.text import normalise
from zipformer_crctc.transcriber import PAUSES, SPLITS, PhoneRecognizer


def set_folder(data_config: Path, name: str) -> Path:
    """The folder of a set, or of the first set of a kind."""
    sets = load_data_config(data_config)
    firsts = {kind: folder for kind in ("dev", "test") for folder in list(getattr(sets, kind).values())[:1]}
    return {**sets.dev, **sets.test, **firsts}[name]


def joined(parts: list[np.ndarray], gap: float, snr: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """One recording with gaps of 0 to 2 `gap` seconds and noise `snr` dB below the speech, and its utterances."""
    rng = np.random.default_rng(0)
    pieces, ends = [], []
    for part in parts:
        pieces += [np.zeros(round(rng.uniform(0, 2 * gap) * SAMPLING_RATE)), part]
        ends.append((ends[-1] if ends else 0) + len(pieces[-2]) + len(part))
    whole = np.concatenate(pieces)
    noise = np.resize(pink_noise(60 * SAMPLING_RATE, rng), len(whole))
    amplitude = np.sqrt(np.mean(np.concatenate(parts) ** 2) / 10 ** (snr / 10))
    whole = (whole + amplitude * noise).astype(np.float32)
    return whole, [whole[end - len(part) : end] for end, part in zip(ends, parts, strict=True)]


def pink_noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,): noise of power 1 that falls by 3 dB an octave from 20 Hz on, as noise of rooms and wind does."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(count, 1 / SAMPLING_RATE), 20.0))
    noise = np.fft.irfft(spectrum, count)
    return noise / noise.std()


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
    parser.add_argument("--gaps", default="0.3", help="comma list: mean seconds between utterances")
    parser.add_argument(
        "--snrs", default="60", help="comma list, one for each of --gaps: dB from the speech to the noise"
    )
    parser.add_argument("--splits", default=",".join(SPLITS), help="comma list: how the recording is cut")
    parser.add_argument("--window", type=float, default=30.0)
    parser.add_argument("--overlap", type=float, default=4.0)
    parser.add_argument("--tolerance", type=float, default=0.5, help="points of PER, for cuts in pauses")
    parser.add_argument("--output", type=Path, default=result_path("long_recording"))
    args = parser.parse_args()
    single = PhoneRecognizer.from_pretrained(args.model, iter=args.iter, avg=args.avg)
    tokenizer = single.recogniser.tokenizer
    chosen = list(repeated(list(utterances(set_folder(args.data_config, args.test_set))), 60 * args.minutes))
    references = [tokenizer.phones(tokenizer.encode(normalise(text, tokenizer.pieces))) for _, text in chosen]
    flat = [phone for reference in references for phone in reference]
    rows, far = [], False
    for gap, snr in zip(map(float, args.gaps.split(",")), map(float, args.snrs.split(",")), strict=True):
        whole, parts = joined([samples for samples, _ in chosen], gap, snr)
        alone = rate(references, [result.phones for result in single.transcribe(parts)])
        for split in args.splits.split(","):
            model = PhoneRecognizer(single.recogniser, window=args.window, overlap=args.overlap, split=split)
            started = time.monotonic()
            (long,) = model.transcribe(whole)
            seconds = time.monotonic() - started
            per = rate([flat], [long.phones])
            far |= split == PAUSES and abs(per - alone) > args.tolerance
            case = f"{long.duration / 60:.0f} min in {split}, gaps of {gap:g} s on average, noise at {snr:g} dB"
            peer = {"name": "utterance by utterance", "speed": round(alone, 2)}
            rows.append(
                row(
                    case,
                    "% PER",
                    round(per, 2),
                    peer,
                    phones=len(long.phones),
                    silence=round(long.silence),
                    seconds=round(seconds, 1),
                )
            )
        write_rows(args.output, rows)
    return int(far)


if __name__ == "__main__":
    sys.exit(main())
