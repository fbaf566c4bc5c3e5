"""A trained model ready to be used, from checkpoints, and the sets to use it on: what the programs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zipformer_crctc.checkpoint import choose_checkpoints, load_model
from zipformer_crctc.checks import CHOICES
from zipformer_crctc.commandline import DecodeArgs, resolve_model
from zipformer_crctc.config import DecodeConfig, ModelConfig, decoding_precision
from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.distributed import autocast_to, choose_device
from zipformer_crctc.features import LOG_EPS
from zipformer_crctc.frontend import padding_mask
from zipformer_crctc.loader import Batch, BatchLoader, build_eval_loader
from zipformer_crctc.memory import keep_freed_memory
from zipformer_crctc.model import CtcModel, build_model
from zipformer_crctc.pretrained import Weights, average_weights, file_weights
from zipformer_crctc.results import file_suffix
from zipformer_crctc.tokenizer import PhoneTokenizer

CAUSAL_PADDING = 30
"""Feature frames of silence appended for a causal model, so that its last chunk sees the end of the speech."""


@dataclass(frozen=True)
class Recogniser:
    """A model ready to decode, and the tokenizer it was trained with."""

    model: CtcModel
    tokenizer: PhoneTokenizer
    config: ModelConfig
    published_padding: bool = False
    """Whether padding leaks into the utterances before it; else the batch makes no difference."""
    precision: str = "fp32"
    """Of the model, see `DecodeConfig`."""

    def __post_init__(self) -> None:
        if self.precision not in (known := CHOICES["precision"]):
            raise ValueError(f"precision {self.precision}: must be {' or '.join(known)}")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def factor(self) -> int:
        """The model's output downsampling factor."""
        return self.config.output_downsampling_factor

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, T', V) of a batch on the model's device, and the number of output frames (N,)."""
        return self.log_probs_of(batch.features, batch.num_frames)

    def log_probs_of(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """The same of features (N, T, 80), padded with ln(1e-10), and their lengths (N,)."""
        features, num_frames = features.to(self.device), num_frames.to(self.device)
        if self.config.causal:
            features, num_frames = with_silence(features, num_frames)
        kind = self.device.type
        with autocast_to(decoding_precision(self.precision, kind), kind):
            log_probs, lengths = self.model(features, num_frames, isolate=not self.published_padding)
        return log_probs, lengths


def with_silence(features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, T, 80) and lengths (N,) of utterances as a causal model hears them, whatever follows them."""
    features = features.masked_fill(padding_mask(num_frames, features.shape[1])[:, :, None], LOG_EPS)
    return F.pad(features, (0, 0, 0, CAUSAL_PADDING), value=LOG_EPS), num_frames + CAUSAL_PADDING


def load_recogniser(args: DecodeArgs) -> Recogniser:
    """The averaged model that the flags name, with its tokenizer, on the device they name; sets the CPU threads.

    Raises:
        CheckpointError, ConfigError: files that are missing or do not fit together.
        ValueError: a GPU is wanted that is not there.
    """
    decode = args.decode
    keep_freed_memory()
    if decode.num_threads:
        torch.set_num_threads(decode.num_threads)
    if decode.checkpoint is not None:
        weights = file_weights(decode.checkpoint, decode.use_averaged_model)
    else:
        weights = average_weights(
            choose_checkpoints(decode.exp_dir, decode.epoch, decode.iter, decode.avg, decode.use_averaged_model)
        )
    settings = decode.device, decode.published_padding, decode.precision
    return build_recogniser(weights, args.given_model, args.data.bpe_model, *settings)


def build_recogniser(
    weights: Weights,
    given_model: Mapping[str, Any],
    bpe_model: Path | None = None,
    device: str = "auto",
    published_padding: bool = False,
    precision: str = "fp32",
) -> Recogniser:
    """A model of these weights, ready to decode.

    Args:
        weights: from pretrained.py.
        given_model: model fields that were given by flags.
        bpe_model: file of the tokenizer; None is the stored one, else the built-in table.
        device: auto, cpu or cuda.
        published_padding: see `Recogniser`.
        precision: see `DecodeConfig`.

    Raises:
        ValueError: a GPU is wanted that is not there, or an unknown precision.
    """
    on = choose_device(device)
    config = resolve_model(weights.config, given_model)
    if bpe_model is not None:
        tokenizer = PhoneTokenizer.from_model(bpe_model)
    else:
        tokenizer = weights.tokenizer or PhoneTokenizer.from_table()
    model = build_model(config, tokenizer.vocab_size)
    load_model(model, weights.state, weights.source)
    return Recogniser(model.eval().to(on), tokenizer, config, published_padding, precision)


def choose_test_sets(wanted: Sequence[str], data_config: Path) -> dict[str, Path]:
    """Name and folder of each set to decode.

    Args:
        wanted: shar folders (with a slash in their name), names of sets of the data config, or the words "dev" and
            "test" for all its sets of that kind; none means "test".
        data_config: read where it is needed.

    Raises:
        ValueError: a name that is none of these, two folders that would get one name, or nothing to decode.
    """
    chosen: dict[str, Path] = {}
    names = [name for name in wanted or ("test",) if "/" not in name]
    if names:
        sets = load_data_config(data_config)
        kinds = {"dev": sets.dev, "test": sets.test}
        known = {**sets.dev, **sets.test}
        if unknown := [name for name in names if name not in kinds and name not in known]:
            raise ValueError(
                f"--test-sets {','.join(unknown)}: neither a folder nor a set of {data_config}, which has: "
                f"{', '.join(known) or 'none'}"
            )
        for name in names:
            chosen |= kinds[name] if name in kinds else {name: known[name]}
        if not chosen:
            sets.require(*[name for name in names if name in kinds])
    for folder in dict.fromkeys(Path(name) for name in wanted if "/" in name):
        name = "-".join(folder.parts[-2:]).strip("/")  # two parts of a path tell sets of several corpora apart
        if name in chosen and chosen[name] != folder:
            raise ValueError(
                f"--test-sets {folder}: is named {name} like {chosen[name]}, and result files would collide; "
                "run the program for each, or rename a folder"
            )
        chosen[name] = folder
    return chosen


def eval_loader(args: DecodeArgs, folder: Path, keep_alignment: bool = False) -> BatchLoader:
    """A loader of one of these sets, with the true times of its phones if asked for."""
    return build_eval_loader(
        [folder],
        max_duration=args.data.max_duration,
        num_workers=args.data.num_workers,
        index_dir=args.data.index_dir,
        need_text=False,
        keep_alignment=keep_alignment,
        zero_padded=args.decode.published_padding,
        pin_memory=choose_device(args.decode.device).type == "cuda",
    )


def result_suffix(decode: DecodeConfig, config: ModelConfig) -> str:
    """What tells the result files of one choice of checkpoints from those of another."""
    if decode.checkpoint is not None:
        return decode.checkpoint.stem
    return file_suffix(
        avg=decode.avg,
        iteration=decode.iter,
        epoch=decode.epoch,
        chunk_size=config.chunk_size[0] if config.causal else None,
        left_context_frames=config.left_context_frames[0] if config.causal else None,
        use_averaged_model=decode.use_averaged_model,
    )
