"""The published lattice methods that need no lexicon, with k2 (1.23 or newer), which nothing else here imports.

`ctc-decoding` is the best path through the lattice of the CTC topology, `nbest` the phone strings of random paths of
it, each with the log of the sum over all its alignments. The packages of k2 on PyPI need an old PyTorch, so this module
and what it imports run with 1.13 too.

Legend: N utterances, T' output frames, V pieces.
Source: the published decoding program's method names and pruning; Graves et al. 2006, "Connectionist temporal
classification", for the topology and the sums.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zipformer_crctc.config import BEST_PATH, NBEST
from zipformer_crctc.search import Hypothesis, adjusted, valid_frames

SEARCH_BEAM, OUTPUT_BEAM = 20.0, 8.0
"""How far behind the best one a state may be, in nats: while searching, in the lattice."""
MIN_ACTIVE, MAX_ACTIVE = 30, 10_000
"""States kept in each frame."""


@dataclass(frozen=True)
class LatticeOptions:
    """Which method, and how it looks for several hypotheses."""

    method: str = BEST_PATH
    """ctc-decoding or nbest."""
    nbest: int = 1
    """nbest: hypotheses returned per utterance, at most."""
    num_paths: int = 100
    """nbest: random paths drawn from each lattice."""
    scale: float = 1.0
    """nbest: factor of the log-probabilities while drawing; below 1 for more different paths."""


def load_k2(method: str) -> Any:
    """The package, or a ValueError that names the decoding method and the remedy."""
    try:
        return importlib.import_module("k2")
    except (ImportError, OSError) as error:
        raise ValueError(
            f"--decoding-method {method}: needs the package k2, which cannot be imported ({error}); install a wheel of "
            "k2 built for your PyTorch (pip install k2==VERSION -f https://k2-fsa.github.io/k2/cpu.html), or give "
            "ctc-prefix-beam-search or ctc-greedy-search, which need nothing"
        ) from error


@torch.no_grad()
def lattice_search(
    log_probs: Tensor,
    lengths: Tensor,
    options: LatticeOptions | None = None,
    factor: int = 1,
    blank_penalty: float = 0.0,
    allowed: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """The best hypotheses of every utterance, best first; at least one each.

    log_probs: (N, T', V), natural logarithms, with the blank at 0 as k2 wants it; lengths: (N,), valid output frames of
    each. factor: the model's output downsampling factor, for the times. blank_penalty, allowed: see `search.adjusted`.
    The score of the best path is its log-probability, that of one of several is the log of the sum over all its
    alignments. An utterance without any allowed path gets an empty hypothesis with a score of minus infinity.

    Raises ValueError where k2 is absent, where shapes or lengths do not fit, and for NaN.
    """
    options = options or LatticeOptions()
    k2 = load_k2(options.method)
    valid_frames(log_probs, lengths)
    found = [[Hypothesis([], [], 0.0, factor)] for _ in lengths]
    order = [n for n in lengths.argsort(descending=True).tolist() if lengths[n]]  # k2 wants the longest first
    if not order:
        return found
    scores = adjusted(log_probs.float(), 0, blank_penalty, allowed)
    segments = torch.tensor([[n, 0, int(lengths[n])] for n in order], dtype=torch.int32)
    topology = _topology(k2, log_probs.size(2), log_probs.device)
    lattice = k2.intersect_dense_pruned(
        topology, k2.DenseFsaVec(scores, segments), SEARCH_BEAM, OUTPUT_BEAM, MIN_ACTIVE, MAX_ACTIVE
    )
    best = k2.shortest_path(lattice, use_double_scores=True)
    drawn = _drawn_paths(k2, lattice, options) if options.method == NBEST else [[] for _ in order]
    for place, n in enumerate(order):
        paths = [_Path.of(best[place].aux_labels, best[place].scores), *drawn[place]]
        if options.method == NBEST:
            found[n] = _summed(paths, scores[n, : int(lengths[n])], factor)[: options.nbest]
        else:
            found[n] = [Hypothesis(paths[0].tokens, paths[0].frames, paths[0].score, factor)]
    return found


@functools.cache
def _topology(k2: Any, vocab: int, device: torch.device) -> Any:
    return k2.ctc_topo(vocab - 1, modified=False).to(device)


@dataclass(frozen=True)
class _Path:
    tokens: list[int]
    frames: list[int]
    score: float

    @staticmethod
    def of(labels: Tensor, scores: Tensor) -> _Path:
        """From the output labels of its arcs, one for each frame and one for the end; 0 where no token begins."""
        if len(labels) == 0:
            return _Path([], [], float("-inf"))
        frames = (labels > 0).nonzero().flatten()
        return _Path(labels[frames].tolist(), frames.tolist(), float(scores.double().sum()))


def _drawn_paths(k2: Any, lattice: Any, options: LatticeOptions) -> list[list[_Path]]:
    """Random paths of each utterance, by their probability."""
    scores, labels = lattice.scores.clone(), lattice.aux_labels
    lattice.scores = scores * options.scale
    drawn = k2.random_paths(lattice, use_double_scores=True, num_paths=options.num_paths).tolist()
    lattice.scores = scores
    return [[_Path.of(labels[arcs], scores[arcs]) for arcs in map(torch.tensor, paths)] for paths in drawn]


def _summed(paths: list[_Path], log_probs: Tensor, factor: int) -> list[Hypothesis]:
    """One hypothesis for each string of tokens, with the frames of the best of its paths."""
    best: dict[tuple[int, ...], _Path] = {}
    for path in paths:
        other = best.setdefault(tuple(path.tokens), path)
        if path.score > other.score:
            best[tuple(path.tokens)] = path
    chosen = list(best.values())
    sizes = torch.tensor([len(path.tokens) for path in chosen])
    targets = torch.tensor([token for path in chosen for token in path.tokens])
    losses = torch.nn.functional.ctc_loss(
        log_probs.double().cpu().unsqueeze(1).expand(-1, len(chosen), -1),
        targets,
        torch.full_like(sizes, len(log_probs)),
        sizes,
        reduction="none",
    )
    found = [
        Hypothesis(path.tokens, path.frames, -loss, factor) for path, loss in zip(chosen, losses.tolist(), strict=True)
    ]
    return sorted(found, key=lambda hypothesis: -hypothesis.score)
