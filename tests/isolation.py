"""How much the log-probs of utterances change with what else is in their batch: `python tests/isolation.py --help`.

    python tests/isolation.py --model exp/espeak --folder data/espeak/test
    python tests/isolation.py --preset small

Utterances of 0.09 to 4 s, each alone and in batches of 8 and of 64 with others: those of a shar folder, cut, or random
numbers. Prints the largest difference of any log-prob; exit status 1 if it is not below the tolerance of the tests.
"""

from __future__ import annotations

import argparse
import sys
from itertools import cycle, islice
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from torch import Tensor

from small_models import draw_parameters, random_batch
from test_isolation import TOLERANCE, differences, mixed_lengths
from zipformer_crctc.features import Fbank, num_feature_frames
from zipformer_crctc.loader import AudioReader, build_eval_loader
from zipformer_crctc.model import build_model
from zipformer_crctc.presets import PRESETS
from zipformer_crctc.recogniser import Recogniser
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.transcriber import PhoneRecognizer

BATCH_SIZES = (8, 64)


def random_model(preset: str) -> Recogniser:
    """A model of a preset with random weights."""
    tokenizer, config = PhoneTokenizer.from_table(), PRESETS[preset]().model
    model = draw_parameters(build_model(config, tokenizer.vocab_size), 0.05).eval()
    return Recogniser(model, tokenizer, config)


def speech(folder: Path, lengths: list[int]) -> Tensor:
    """Features (N, T, 80) of utterances of a folder, over and over, each at least as long as asked for."""
    loader, read, fbank = build_eval_loader([folder], num_workers=0), AudioReader(), Fbank()
    chosen = [utterance for request in loader.order.epoch(1, 0) for utterance in request.utterances]
    long = [item for item in chosen if num_feature_frames(item.num_samples) >= max(lengths)]
    if not long:
        raise ValueError(f"{folder}: no utterance has {max(lengths) / 100:g} s; give another folder")
    found = [fbank(torch.from_numpy(read(item)))[: max(lengths)] for item in islice(long, len(lengths))]
    return torch.stack(list(islice(cycle(found), len(lengths))))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="as of transcribe.py; without it random weights")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS), help="of random weights")
    parser.add_argument("--folder", type=Path, help="shar folder with utterances; without it random numbers")
    parser.add_argument("--utterances", type=int, default=200)
    args = parser.parse_args()
    named = PhoneRecognizer.from_pretrained(args.model, device="cpu").recogniser if args.model else None
    model = named or random_model(args.preset)
    lengths = mixed_lengths(args.utterances)
    features = speech(args.folder, lengths) if args.folder else random_batch(lengths, [""] * len(lengths)).features
    worst = differences(model, lengths, BATCH_SIZES, features).max(dim=1).values.tolist()
    for size, value in zip(BATCH_SIZES, worst, strict=True):
        print(f"{args.utterances} utterances alone and in batches of {size}: largest difference {value:.2e}")
    return int(max(worst) >= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
