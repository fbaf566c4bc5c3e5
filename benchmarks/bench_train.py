"""Speed and memory of whole training steps, ours and the peer's in turn.

    python benchmarks/bench_train.py --peer zipformer-0.1.3-py3-none-any.whl --threads 2 --sizes small
    python benchmarks/bench_train.py --device cuda --bf16 --utterances 24 --profile

A step is: two augmented views of each utterance, front-end, encoder, CTC and consistency loss, backward pass and
ScaledAdam, with every regulariser and schedule as it is at the adjusted batch count 20,000. The peer's step has no
augmentation. Rows go to benchmarks/results/train.json: seconds of audio trained on per second, and the peak memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import peer, speed
from benchmarks.results_file import result_path
from benchmarks.speed import BATCH_COUNT, OURS, Case, Work
from zipformer_crctc.cudagraphs import REPLAYS, GraphedPasses
from zipformer_crctc.loader import Batch
from zipformer_crctc.losses import consistency_loss, ctc_loss
from zipformer_crctc.memory import keep_freed_memory
from zipformer_crctc.model import build_model
from zipformer_crctc.objective import Objective
from zipformer_crctc.optim import ScaledAdam
from zipformer_crctc.presets import PRESETS
from zipformer_crctc.schedule import set_batch_count
from zipformer_crctc.shar import Utterance
from zipformer_crctc.tokenizer import PhoneTokenizer

OUTPUT = result_path("train")
PHONES_PER_SECOND = 8


def main() -> None:
    args = speed.parser(__doc__, ["small"], OUTPUT).parse_args()
    for case in speed.cases(args, ["training"]):
        rows = speed.measure(make, case, args.steps, args.warmup, args.profile, "audio s/s")
        speed.write(args.output, rows)


def make(case: Case, who: str) -> Work:
    """The training step of ours or the peer's."""
    tokenizer = PhoneTokenizer.from_table()
    frames = round(case.seconds * 100)
    features = torch.randn(case.utterances, frames, 80, device=case.device)
    num_frames = torch.full((case.utterances,), frames, device=case.device)
    autocast = torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=case.bf16)
    labels = torch.randint(4, tokenizer.vocab_size, (case.utterances, round(case.seconds * PHONES_PER_SECOND)))
    targets = [row.tolist() for row in labels]
    passes: Callable[..., Any] | None = None
    if who == OURS:
        keep_freed_memory()  # as our programs do
        config = PRESETS[case.size]()
        model: torch.nn.Module = build_model(config.model, tokenizer.vocab_size).to(case.device).train()
        set_batch_count(model, BATCH_COUNT)
        optimizer: torch.optim.Optimizer = ScaledAdam(model.named_parameters(), lr=0.015, clipping_scale=2.0)
        by_name = {str(number): target for number, target in enumerate(targets)}
        objective = Objective(config, by_name.__getitem__)
        batch = Batch(features, num_frames, [_utterance(name, case.seconds) for name in by_name])

        passes = GraphedPasses(model) if case.on_gpu else model  # as train.py has it

        def loss() -> torch.Tensor:
            return objective.train_loss(passes, batch, autocast).total

    else:
        parts = peer.load(case.peer_path)
        model = peer.PeerModel(parts, case.size, tokenizer.vocab_size, BATCH_COUNT).to(case.device).train()
        groups = [{"named_params": list(model.named_parameters()), "lr": 0.015}]
        optimizer = parts.optimizer(groups, lr=0.015, clipping_scale=2.0)
        all_labels = labels.flatten().repeat(2).to(case.device)
        label_lengths = torch.full((2 * case.utterances,), labels.shape[1], device=case.device)

        def loss() -> torch.Tensor:
            with autocast:
                log_probs, lengths = model(features.repeat(2, 1, 1), num_frames.repeat(2))
            ctc = ctc_loss(log_probs, lengths, all_labels, label_lengths)
            return (ctc + 0.2 * consistency_loss(log_probs, lengths)) / 2

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad(), autocast:
            model(features, num_frames)

    def recording() -> float:
        return passes.seconds_of_last_recording / REPLAYS if isinstance(passes, GraphedPasses) else 0.0

    # Two views, and a backward pass does twice the work of a forward pass.
    return Work(step, model, 6.0, forward, recording)


def _utterance(name: str, seconds: float) -> Utterance:
    """One whose text is its name."""
    return Utterance(name, seconds, round(seconds * 16000), name, "", "", "", 0, 0)


if __name__ == "__main__":
    main()
