"""What k2_one_best.sh runs: `ours FOLDER` writes log-probs and what our searches find, `k2 FOLDER` compares.

The second runs with Python 3.10 and PyTorch 1.13.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from zipformer_crctc.search import greedy_search

NUM, FRAMES, VOCAB = 60, 60, 40


def ours(folder: Path) -> None:
    """30 random utterances and 30 peaky ones."""
    from zipformer_crctc.beam import BeamOptions, prefix_beam_search

    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(NUM, FRAMES, VOCAB, generator=generator)
    logits[::2] /= 3.0
    logits[::2, :, 0] += 9.0
    peaks = torch.randint(1, VOCAB, (NUM, FRAMES, 1), generator=generator)
    there = (torch.rand(NUM, FRAMES, 1, generator=generator) < 0.3) * 12.0
    logits[::2] = logits[::2].scatter_add(2, peaks[::2], there[::2])
    log_probs = logits.log_softmax(dim=2)
    lengths = torch.randint(0, FRAMES + 1, (NUM,), generator=generator)
    lengths[:2] = FRAMES
    greedy = greedy_search(log_probs, lengths)
    beam = prefix_beam_search(log_probs, lengths, BeamOptions(64))
    np.save(folder / "log_probs.npy", log_probs.numpy())
    found = {
        "lengths": lengths.tolist(),
        "greedy": [[h.tokens, h.frames, h.score] for h in greedy],
        "beam": [[listed[0].tokens, listed[0].score] for listed in beam],
    }
    (folder / "ours.json").write_text(json.dumps(found))


def with_k2(folder: Path) -> None:
    """The best path must be the greedy one; the first of several strings must have at least the probability of the best
    path, and if the beam search found the same string, of those of its alignments that the beam has followed."""
    from zipformer_crctc.k2_search import NBEST, LatticeOptions, lattice_search

    log_probs = torch.from_numpy(np.load(folder / "log_probs.npy"))
    wanted = json.loads((folder / "ours.json").read_text())
    lengths = torch.tensor(wanted["lengths"])
    wrong, same_as_beam = 0, 0
    best = lattice_search(log_probs, lengths)
    several = lattice_search(log_probs, lengths, LatticeOptions(NBEST, nbest=4))
    for n in range(len(log_probs)):
        tokens, frames, score = wanted["greedy"][n]
        beam_tokens, beam_score = wanted["beam"][n]
        problems = []
        if (best[n][0].tokens, best[n][0].frames) != (tokens, frames) or abs(best[n][0].score - score) > 1e-3:
            problems.append(f"best path {best[n][0]}, ours {tokens, frames, score}")
        if several[n][0].score < score - 1e-3:
            problems.append(f"nbest {several[n][0].score}, best path {score}")
        if several[n][0].tokens == beam_tokens and several[n][0].score < beam_score - 1e-3:
            problems.append(f"nbest {several[n][0].score}, less than the beam's part of its alignments, {beam_score}")
        same_as_beam += several[n][0].tokens == beam_tokens
        wrong += bool(problems)
        for problem in problems:
            print(f"utterance {n}: {problem}")
    peaky = sum(several[n][0].tokens == wanted["beam"][n][0] for n in range(0, len(log_probs), 2))
    print(
        f"k2: {len(log_probs) - wrong} of {len(log_probs)} utterances agree; first of nbest as with a beam of 64: "
        f"{same_as_beam}, {peaky} of {len(log_probs) // 2} peaky ones"
    )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    {"ours": ours, "k2": with_k2}[sys.argv[1]](Path(sys.argv[2]))
