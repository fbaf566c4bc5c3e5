"""Write a trained model for transformers: `python zipformer_crctc/save_pretrained.py --exp-dir DIR`.

The folder holds safetensors weights, the tokenizer, a model card and a small file by which
`AutoModelForCTC.from_pretrained(folder, trust_remote_code=True)` finds this package. `--help` lists the flags.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zipformer_crctc.checks import check_full_precision, check_no_search
from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.config import GREEDY_SEARCH
from zipformer_crctc.flags import raise_if_any
from zipformer_crctc.modelcard import model_card
from zipformer_crctc.recogniser import Recogniser, load_recogniser, result_suffix
from zipformer_crctc.tracking import set_up_logging

logger = logging.getLogger(__name__)

REMOTE_CODE = '''"""Leads transformers to the package zipformer_crctc."""

try:
    from zipformer_crctc.hf import ZipformerCrctcConfig, ZipformerCrctcForCTC, ZipformerCrctcProcessor
except ImportError as error:
    raise ImportError(
        f"this model needs the package zipformer_crctc and transformers ({error}): run pip install '.[hf]' in a clone "
        "of its repository"
    ) from error

__all__ = ["ZipformerCrctcConfig", "ZipformerCrctcForCTC", "ZipformerCrctcProcessor"]
'''


@dataclass(frozen=True)
class PretrainedConfig:
    """Where the folder is written, and what its model card says."""

    output_dir: Path | None = None
    """Folder for the files; without it the folder transformers beside the checkpoints."""
    name: str = ""
    """Name of the model in its card; without it that of --exp-dir."""
    license: str = "apache-2.0"
    """Licence of the weights, by its name on the Hugging Face hub."""
    languages: tuple[str, ...] = ()
    """Comma list of language codes that it was trained on; without it those of the tables of results, if there."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration or an unfit checkpoint ends it with status 2 and one message."""
    about = "Write a trained model for transformers."
    run_program("save_pretrained.py", lambda: parse_decode_args(argv, PretrainedConfig, about), run)


def run(args: DecodeArgs) -> None:
    """Write the folder."""
    own: PretrainedConfig = args.own
    raise_if_any([*check_no_search(args.decode), *check_full_precision(args.decode)])
    recogniser = load_recogniser(args)
    exp_dir = args.decode.exp_dir if args.decode.checkpoint is None else args.decode.checkpoint.parent
    folder = own.output_dir or exp_dir / "transformers"
    set_up_logging(folder / "log", rank=0, world_size=1, name="save-pretrained")
    for warning in args.warnings:
        logger.warning(warning)
    suffix = result_suffix(args.decode, recogniser.config)
    summaries = read_summaries(exp_dir / GREEDY_SEARCH, suffix)
    if not summaries:
        logger.warning("no summary-*-%s.md in %s: the model card has no results", suffix, exp_dir / GREEDY_SEARCH)
    name = own.name or exp_dir.resolve().name
    save_pretrained(recogniser, folder, model_card(recogniser, name, own.license, own.languages, summaries))
    logger.info("wrote %s", folder)


def save_pretrained(recogniser: Recogniser, folder: str | Path, card: str) -> None:
    """Write a folder that `from_pretrained` of transformers reads.

    Args:
        recogniser: the model and its tokenizer.
        folder: made if it is not there.
        card: text of its README.md.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        from zipformer_crctc import hf
    except ImportError as error:
        raise ValueError(f"this needs the package transformers ({error}): pip install '.[hf]'") from error
    model, processor = hf.to_transformers(recogniser)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (Path(folder) / f"{hf.REMOTE_MODULE}.py").write_text(REMOTE_CODE, encoding="utf-8")
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")


def read_summaries(folder: Path, suffix: str) -> Mapping[str, str]:
    """The tables that decode.py wrote for a choice of checkpoints, by the name of the test set."""
    found = {}
    for path in sorted(folder.glob(f"summary-*-{suffix}.md")):
        title, _, table = path.read_text(encoding="utf-8").partition("\n")
        found[re.sub(r"^# ", "", title)] = table.strip()
    return found


if __name__ == "__main__":
    main()
