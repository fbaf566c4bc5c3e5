"""The phones of a language, from the training texts of a data config: a file for decode.py --inventory."""

from __future__ import annotations

import argparse
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from local.command import add_phones, load_tokenizer, positive_int, run
from local.texts import read_texts
from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.objective import TargetEncoder
from zipformer_crctc.tokenizer import PhoneTokenizer


def count_phones(folders: Iterable[Path], tokenizer: PhoneTokenizer, language: str) -> Counter[str]:
    """How often each symbol stands in the texts of a language; symbols without a piece are left out and named."""
    encode = TargetEncoder(tokenizer)
    counts = Counter(token for text in read_texts(folders, encode, language) for token in text)
    for line in encode.unknown.report().splitlines():
        logging.warning("left out: %s", line)
    special = (tokenizer.unk_id, tokenizer.boundary_id)
    return Counter({tokenizer.pieces[token]: count for token, count in counts.items() if token not in special})


def write_inventory(
    data_config: Path, language: str, output: Path, tokenizer: PhoneTokenizer, min_count: int = 1
) -> list[str]:
    """Write the symbols that stand `min_count` times or more in the texts of a language, the most frequent first."""
    sets = load_data_config(data_config).require("train")
    counts = count_phones(sets.train, tokenizer, language)
    phones = [phone for phone, count in counts.most_common() if count >= min_count]
    rare = [f"{_shown(phone)} {count}" for phone, count in counts.most_common() if count < min_count]
    if rare:
        logging.info(
            "%s: %d symbols are rarer than %d and left out: %s", language, len(rare), min_count, ", ".join(rare)
        )
    if not phones:
        raise ValueError(f"language {language!r}: no symbol stands {min_count} times in its texts; lower --min-count")
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {language}: {len(phones)} symbols of the training texts of {data_config}", *map(_shown, phones)]
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    logging.info("%s: %d symbols", output, len(phones))
    return phones


def _shown(phone: str) -> str:
    """With a carrier under a mark, so that it can be seen."""
    return f"◌{phone}" if unicodedata.combining(phone) else phone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-config", type=Path, required=True, help="YAML file that lists the sets")
    parser.add_argument("--language", required=True, help="as the training data name it")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--min-count", type=positive_int, default=1, help="leave rarer symbols out (default: 1)")
    add_phones(parser)
    args = parser.parse_args()
    write_inventory(args.data_config, args.language, args.output, load_tokenizer(args.phones), args.min_count)


if __name__ == "__main__":
    run(main)
