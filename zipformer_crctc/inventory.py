"""A phone inventory: which tokens may come out of the search.

The file holds one phone a line, or several with white space between them; lines that begin with `#` are comments.
Phones are normalised like all texts (text.py). The tokenizer's pieces are single symbols, so a phone that is written
with several of them (`tʰ`, `t͡ʃ`) allows each of its symbols. The word boundary is no phone and always allowed; `<unk>`
never is.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from zipformer_crctc.text import name_symbols, normalise
from zipformer_crctc.tokenizer import PhoneTokenizer

logger = logging.getLogger(__name__)


def read_inventory(path: str | Path, tokenizer: PhoneTokenizer) -> Tensor:
    """The tokens that the phones of a file allow, as a mask (V,) of bool.

    Raises ValueError that names the file and lists every phone the tokenizer cannot write, and for a file without any.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the phone inventory as UTF-8 text ({error})") from error
    return parse_inventory(text, tokenizer, str(path))


def parse_inventory(text: str, tokenizer: PhoneTokenizer, name: str = "phone inventory") -> Tensor:
    """The same of the text of such a file; messages call it by `name`."""
    phones = [
        (phone, number)
        for number, line in enumerate(text.splitlines(), start=1)
        if not line.lstrip().startswith("#")
        for phone in line.split()
    ]
    if not phones:
        raise ValueError(f"{name}: lists no phones; give one a line, or leave the inventory out")
    allowed = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    allowed[[tokenizer.blank_id, tokenizer.boundary_id]] = True
    dropped: Counter[str] = Counter()
    unknown = []
    for phone, number in phones:
        ids = tokenizer.encode(normalise(phone, tokenizer.pieces, dropped))
        # What normalises to nothing, such as a tone, is never in a transcription either.
        if not ids or tokenizer.unk_id in ids:
            unknown.append(f"{phone} (line {number})")
        else:
            allowed[ids] = True
    if unknown:
        raise ValueError(
            f"{name}: the tokenizer cannot write these phones: {', '.join(unknown)}; write them with symbols of its "
            f"table, or remove them. It has: {' '.join(inventory_phones(torch.ones_like(allowed), tokenizer))}"
        )
    if dropped:
        logger.warning("%s: marks that the pieces cannot express were dropped: %s", name, name_symbols(dropped))
    return allowed


def inventory_phones(allowed: Tensor, tokenizer: PhoneTokenizer) -> list[str]:
    """The symbols that a mask allows, without the boundary and other special pieces."""
    special = (tokenizer.blank_id, tokenizer.sos_eos_id, tokenizer.unk_id, tokenizer.boundary_id)
    return [tokenizer.pieces[i] for i in allowed.nonzero().flatten().tolist() if i not in special]
