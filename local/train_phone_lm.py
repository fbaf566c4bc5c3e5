"""A phone language model for decode.py --lm, from the training texts of a data config: modified Kneser-Ney, ARPA.

Texts are turned into tokens as training does it, so the model predicts what the recogniser writes. Prints the
perplexity on every dev set.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from local.command import add_phones, load_tokenizer, positive_int, run
from local.kneser_ney import estimate, write_arpa
from local.texts import read_texts
from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.ngram import NgramLM, read_arpa
from zipformer_crctc.objective import TargetEncoder
from zipformer_crctc.shar import DataError
from zipformer_crctc.tokenizer import PhoneTokenizer

ORDER = 4


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts some texts."""

    texts: int
    tokens: int
    """The end of each text included."""
    nats: float
    """Negative log-probability."""

    @property
    def per_token(self) -> float:
        """The perplexity; NaN without texts."""
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan


def perplexity(model: NgramLM, texts: Iterable[list[int]]) -> Perplexity:
    """Of a model on texts."""
    scores = [model.token_scores(text) for text in texts]
    return Perplexity(len(scores), sum(map(len, scores)), -math.fsum(math.fsum(score) for score in scores))


def train(
    data_config: Path,
    output: Path,
    tokenizer: PhoneTokenizer,
    order: int = ORDER,
    language: str = "",
    without_diacritics: bool = False,
) -> NgramLM:
    """Estimate a model, write it, read it back and log its perplexities; with a language, from texts in it only."""
    sets = load_data_config(data_config).require("train")
    encode = TargetEncoder(tokenizer, without_diacritics)
    texts = read_texts(sets.train, encode, language)
    for line in encode.unknown.report().splitlines():
        logging.info("train: %s", line)
    never = (tokenizer.blank_id, tokenizer.sos_eos_id)
    predicted = [number for number in range(tokenizer.vocab_size) if number not in never]
    estimated = estimate(texts, tokenizer.pieces, predicted, order)
    write_arpa(estimated, output)
    sizes = " + ".join(str(len(part.keys)) for part in estimated.orders)
    logging.info("%s: %d texts, %d tokens; %s n-grams", output, len(texts), sum(map(len, texts)), sizes)
    model = read_arpa(output, tokenizer)
    _report("train", perplexity(model, texts))
    for name, folder in sets.dev.items():
        try:
            held_out = read_texts([folder], TargetEncoder(tokenizer, without_diacritics), language)
        except DataError as error:
            logging.warning("%s: no perplexity: %s", name, error)
            continue
        _report(name, perplexity(model, held_out))
    return model


def _report(name: str, result: Perplexity) -> None:
    print(f"{name}: perplexity {result.per_token:.3f} ({result.texts} texts, {result.tokens} tokens with ends)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-config", type=Path, required=True, help="YAML file that lists the sets")
    parser.add_argument("--output", type=Path, required=True, help="ARPA file to write; gzip if it ends in .gz")
    parser.add_argument("--order", type=positive_int, default=ORDER, help=f"longest n-gram (default: {ORDER})")
    parser.add_argument("--language", default="", help="use texts in this language only")
    parser.add_argument("--remove-diacritics", action="store_true", help="for a model trained without diacritics")
    add_phones(parser)
    parser.add_argument("--bpe-model", type=Path, help="tokenizer model file, in place of --phones")
    args = parser.parse_args()
    tokenizer = PhoneTokenizer.from_model(args.bpe_model) if args.bpe_model else load_tokenizer(args.phones)
    train(args.data_config, args.output, tokenizer, args.order, args.language, args.remove_diacritics)


if __name__ == "__main__":
    run(main)
