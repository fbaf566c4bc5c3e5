"""Decoding methods by name: from the configuration to a search of one interface, and the names of its result files.

Legend: N utterances, T' output frames, V pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from zipformer_crctc.beam import BeamOptions, prefix_beam_search
from zipformer_crctc.config import BEAM_SEARCH, BEST_PATH, NBEST, DecodeConfig
from zipformer_crctc.inventory import read_inventory
from zipformer_crctc.k2_search import LatticeOptions, lattice_search, load_k2
from zipformer_crctc.ngram import Fusion, NgramLM, read_arpa
from zipformer_crctc.search import Hypothesis, greedy_search
from zipformer_crctc.tokenizer import PhoneTokenizer

Search = Callable[[Tensor, Tensor], list[list[Hypothesis]]]
"""From log-probs (N, T', V) and lengths (N,) to the n-best hypotheses of each utterance, one at least, best first."""


def build_search(
    decode: DecodeConfig,
    tokenizer: PhoneTokenizer,
    device: torch.device | str = "cpu",
    factor: int = 1,
    lm: NgramLM | None = None,
    allowed: Tensor | None = None,
) -> Search:
    """The search that a configuration asks for, on a device; `factor` is the model's output downsampling factor.

    lm: the language model, where it was read already and is on that device.
    allowed: (V,) bool, the phone inventory, where it was read already; it goes before the configuration's.
    Raises ValueError for a language model or an inventory that cannot be used, and where k2 is needed but absent.
    """
    if allowed is None and decode.inventory is not None:
        allowed = read_inventory(decode.inventory, tokenizer)
    if allowed is not None:
        allowed = allowed.to(device)
    blank, penalty = tokenizer.blank_id, decode.blank_penalty
    if decode.decoding_method in (BEST_PATH, NBEST):
        load_k2(decode.decoding_method)
        lattice = LatticeOptions(decode.decoding_method, decode.nbest, decode.num_paths, decode.nbest_scale)

        def with_k2(log_probs: Tensor, lengths: Tensor) -> list[list[Hypothesis]]:
            return lattice_search(log_probs, lengths, lattice, factor, penalty, allowed)

        return with_k2
    if decode.decoding_method != BEAM_SEARCH:

        def greedy(log_probs: Tensor, lengths: Tensor) -> list[list[Hypothesis]]:
            return [[best] for best in greedy_search(log_probs, lengths, blank, factor, penalty, allowed)]

        return greedy

    options = BeamOptions(decode.beam, decode.nbest, decode.blank_skip, decode.top_tokens)
    fusion = None
    if lm is None and decode.lm is not None:
        lm = read_arpa(decode.lm, tokenizer).to(device)
    if lm is not None or decode.insertion_bonus:
        fusion = Fusion(lm, decode.lm_weight, decode.insertion_bonus)

    def beam(log_probs: Tensor, lengths: Tensor) -> list[list[Hypothesis]]:
        return prefix_beam_search(log_probs, lengths, options, blank, factor, penalty, allowed, fusion)

    return beam


def search_suffix(decode: DecodeConfig) -> str:
    """What the names of result files say about the search, so that runs do not overwrite each other."""
    default, parts = DecodeConfig(), list[str]()
    if decode.decoding_method == BEAM_SEARCH:
        parts.append(f"beam-{decode.beam}")
        if decode.lm is not None:
            parts.append(f"lm-{_stem(decode.lm)}-{decode.lm_weight:g}")
        for name in ("insertion_bonus", "top_tokens", "blank_skip"):
            if (value := getattr(decode, name)) != getattr(default, name):
                parts.append(f"{name.replace('_', '-')}-{value:g}")
    if decode.decoding_method == NBEST:
        parts.append(f"paths-{decode.num_paths}-scale-{decode.nbest_scale:g}")
    if decode.inventory is not None:
        parts.append(f"inventory-{_stem(decode.inventory)}")
    if decode.blank_penalty:
        parts.append(f"blank-penalty-{decode.blank_penalty:g}")
    return "".join(f"-{part}" for part in parts)


def _stem(path: Path) -> str:
    """The name without .gz and the ending before it; dots within it stay, as in `phones.swa.txt`."""
    return Path(path.name.removesuffix(".gz")).stem
