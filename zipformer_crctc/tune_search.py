"""Find the weights of the beam search on dev data: `python zipformer_crctc/tune_search.py --exp-dir DIR --lm FILE`.

Runs the model once, keeps its log-probabilities in memory (100 MB for each hour of speech), and searches with every
pair of language model weight and insertion bonus. Prints a table of PER and the flags of the best pair. `--help` lists
the flags.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.config import BEAM_SEARCH
from zipformer_crctc.flags import ConfigError
from zipformer_crctc.loader import BatchLoader
from zipformer_crctc.methods import Search, build_search
from zipformer_crctc.metrics import score
from zipformer_crctc.ngram import read_arpa
from zipformer_crctc.recogniser import Recogniser, choose_test_sets, eval_loader, load_recogniser
from zipformer_crctc.text import normalise
from zipformer_crctc.tokenizer import PhoneTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneConfig:
    """What is tried."""

    weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    """Comma list of values for --lm-weight."""
    bonuses: tuple[float, ...] = (0.0, 0.3, 0.6, 0.9, 1.2)
    """Comma list of values for --insertion-bonus."""


@dataclass(frozen=True)
class Scored:
    """The output of the model for some utterances, and their references."""

    log_probs: Tensor
    """(N, T', V)."""
    lengths: Tensor
    """(N,)."""
    references: list[list[str]]
    """Phones without word boundaries."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration, missing data or an unfit checkpoint ends it with status 2 and one message."""
    description = "Find the language model weight and the insertion bonus on dev data."
    run_program("tune_search.py", lambda: parse_decode_args(argv, TuneConfig, description, BEAM_SEARCH), run)


def run(args: DecodeArgs) -> None:
    """Print PER for every pair, over all test sets together; these are the dev sets unless --test-sets names others."""
    decode, own = args.decode, args.own
    if decode.lm is None:
        raise ConfigError(["--lm: give the language model whose weight is to be found."])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for warning in args.warnings:
        logger.warning(warning)
    sets = choose_test_sets(decode.test_sets or ("dev",), args.data.data_config)
    recogniser = load_recogniser(args)
    lm = read_arpa(decode.lm, recogniser.tokenizer).to(recogniser.device)
    loaders = [eval_loader(args, path) for path in sets.values()]
    batches = [batch for loader in loaders for batch in outputs(recogniser, loader, args.data.remove_diacritics)]
    for name, loader in zip(sets, loaders, strict=True):
        for what in (loader.order.skipped, loader.skipped):
            if what.total:
                logger.warning("%s: not decoded: %s", name, what.report())
    if not any(any(batch.references) for batch in batches):
        raise ValueError(f"{', '.join(sets)}: no references to score; name sets with texts by --test-sets")
    rates: dict[tuple[float, float], float] = {}
    print("| weight | " + " | ".join(f"bonus {bonus:g}" for bonus in own.bonuses) + " |")
    print("| ---: |" + len(own.bonuses) * " ---: |", flush=True)
    for weight in own.weights:
        for bonus in own.bonuses:
            tried = replace(decode, lm_weight=weight, insertion_bonus=bonus)
            search = build_search(tried, recogniser.tokenizer, recogniser.device, recogniser.factor, lm)
            rates[weight, bonus] = phone_error_rate(batches, search, recogniser.tokenizer)
        row = (f"{rates[weight, bonus]:.2f}" for bonus in own.bonuses)
        print(f"| {weight:g} | {' | '.join(row)} |", flush=True)
    weight, bonus = min(rates, key=lambda pair: rates[pair])
    print(f"\nPER {rates[weight, bonus]:.2f} % with --lm-weight {weight:g} --insertion-bonus {bonus:g}")


@torch.inference_mode()
def outputs(recogniser: Recogniser, loader: BatchLoader, without_diacritics: bool = False) -> list[Scored]:
    """Log-probabilities and references of all utterances of a loader, in its batches; references may be empty.

    without_diacritics: delete diacritics from the references.
    """
    tokenizer = recogniser.tokenizer
    found = []
    for batch in loader:
        if batch.is_empty:
            continue
        texts = [normalise(text, tokenizer.pieces, None, without_diacritics) for text in batch.texts]
        references = [without_boundaries(tokenizer.encode(text), tokenizer) for text in texts]
        found.append(Scored(*recogniser.log_probs(batch), references))
    return found


def phone_error_rate(batches: Iterable[Scored], search: Search, tokenizer: PhoneTokenizer) -> float:
    """PER in percent over the utterances that have a reference."""
    pairs = []
    for batch in batches:
        found = search(batch.log_probs, batch.lengths)
        hypotheses = (without_boundaries(hypotheses[0].tokens, tokenizer) for hypotheses in found)
        pairs += [(ref, hyp) for ref, hyp in zip(batch.references, hypotheses, strict=True) if ref]
    return score(pairs).per


def without_boundaries(tokens: Iterable[int], tokenizer: PhoneTokenizer) -> list[str]:
    """The phones of tokens."""
    return tokenizer.phones(token for token in tokens if token != tokenizer.boundary_id)


if __name__ == "__main__":
    main()
