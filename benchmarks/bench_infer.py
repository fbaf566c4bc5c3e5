"""Speed and memory of recognition, ours and the peer's in turn.

    pip download --no-deps zipformer==0.1.3
    python benchmarks/bench_infer.py --peer zipformer-0.1.3-py3-none-any.whl --threads 2 --sizes small --utterances 1 16

`forward pass` is the network; `features to phones` is greedy search besides; `FLAC to phones` also reads FLAC files and
computes filterbanks. Files, filterbanks and search are ours for the peer too, so the rows differ by the networks.
`16 x 10 s` is a batch of 16 utterances. Rows go to benchmarks/results/infer.json: seconds of audio recognised per
second, the real-time factor (seconds of computing per second of audio), and the peak memory.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from benchmarks import peer, speed
from benchmarks.results_file import result_path
from benchmarks.speed import BATCH_COUNT, OURS, Case, Work
from zipformer_crctc.audio import load_audio
from zipformer_crctc.features import SAMPLING_RATE, Fbank, num_feature_frames
from zipformer_crctc.flac import decode
from zipformer_crctc.memory import keep_freed_memory
from zipformer_crctc.model import build_model
from zipformer_crctc.presets import PRESETS
from zipformer_crctc.search import greedy_search
from zipformer_crctc.tokenizer import PhoneTokenizer

OUTPUT = result_path("infer")
NETWORK, FEATURES, AUDIO = "forward pass", "features to phones", "FLAC to phones"
SPEED = "audio s/s"
RECORDINGS = 16
"""Different ones; larger batches have them several times."""


def main() -> None:
    args = speed.parser(__doc__, ["small"], OUTPUT).parse_args()
    for case in speed.cases(args, [NETWORK, FEATURES, AUDIO]):
        rows = speed.measure(make, case, args.steps, args.warmup, args.profile, SPEED)
        speed.write(args.output, [with_real_time_factor(row) if row["unit"] == SPEED else row for row in rows])


def with_real_time_factor(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the inverse of its speeds."""
    factors = {"real-time factor": row["ours"], "the peer's": row["peer"] and row["peer"]["speed"]}
    return {**row, "columns": {name: speed and round(1 / speed, 5) for name, speed in factors.items()}}


class Isolated(nn.Module):
    """A model of ours as recognition uses it: what follows an utterance in the batch does not change it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """As `CtcModel.forward`."""
        return self.model(features, num_frames, isolate=True)


def make(case: Case, who: str) -> Work:
    """Recognition by ours or by the peer's network."""
    tokenizer = PhoneTokenizer.from_table()
    if who == OURS:
        keep_freed_memory()  # as our programs do
        model: nn.Module = Isolated(build_model(PRESETS[case.size]().model, tokenizer.vocab_size))
    else:
        model = peer.PeerModel(peer.load(case.peer_path), case.size, tokenizer.vocab_size, BATCH_COUNT)
    model = model.to(case.device).eval()
    autocast = torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=case.bf16)
    fbank = Fbank()
    rng = np.random.default_rng(0)
    size = min(case.utterances, RECORDINGS), round(case.seconds * SAMPLING_RATE)
    noises = 0.1 * rng.standard_normal(size, dtype=np.float32)
    batch = [number % RECORDINGS for number in range(case.utterances)]
    files, paths = tempfile.TemporaryDirectory(), []
    if case.kind == AUDIO:
        for number, noise in enumerate(noises):
            paths.append(Path(files.name) / f"{number}.flac")
            soundfile.write(paths[-1], noise, SAMPLING_RATE, subtype="PCM_16")

    pool = ThreadPoolExecutor()

    def mirrored_samples(number: int) -> Tensor:
        return fbank.mirrored(torch.from_numpy(decode(paths[number].read_bytes())[0]))

    def read() -> Tensor:
        if not case.on_gpu:
            return torch.stack(fbank.batch([torch.from_numpy(load_audio(paths[number])[0]) for number in batch]))
        # As decode.py: workers decode, and the GPU makes the features.
        mirrored = torch.stack(list(pool.map(mirrored_samples, batch)))
        return fbank.of_mirrored(mirrored.to(case.device), num_frames)

    frames = num_feature_frames(round(case.seconds * SAMPLING_RATE))
    num_frames = torch.full((case.utterances,), frames, device=case.device)
    features = torch.stack(fbank.batch([torch.from_numpy(noise) for noise in noises]))[batch].to(case.device)

    def forward(given: Tensor) -> tuple[Tensor, Tensor]:
        with autocast:
            return model(given, num_frames)

    def recognise(given: Tensor) -> list[list[str]]:
        return [tokenizer.phones(found.tokens) for found in greedy_search(*forward(given))]

    def from_files() -> object:
        return files, recognise(read().to(case.device))  # the files live as long as this function

    steps = {NETWORK: partial(forward, features), FEATURES: partial(recognise, features), AUDIO: from_files}
    steps = {kind: torch.inference_mode()(step) for kind, step in steps.items()}  # as our programs do
    return Work(steps[case.kind], model, 1.0, steps[NETWORK])


if __name__ == "__main__":
    main()
