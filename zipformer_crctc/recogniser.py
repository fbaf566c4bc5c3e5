"""A trained model ready to be used, from checkpoints, and the sets to use it on: what the programs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zipformer_crctc import checkpoint
from zipformer_crctc.commandline import DecodeArgs, resolve_model
from zipformer_crctc.config import DecodeConfig, ModelConfig, config_from_dict, model_from_published
from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.distributed import choose_device
from zipformer_crctc.features import LOG_EPS
from zipformer_crctc.loader import Batch, BatchLoader, build_eval_loader
from zipformer_crctc.model import CtcModel, build_model
from zipformer_crctc.model_sizes import sizes_from_state_dict
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
    isolate: bool = False
    """Give each utterance of a batch what it gets alone, which the published system does not; not for causal models."""

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
        features, num_frames = batch.features.to(self.device), batch.num_frames.to(self.device)
        if self.config.causal:
            features = F.pad(features, (0, 0, 0, CAUSAL_PADDING), value=LOG_EPS)
            num_frames = num_frames + CAUSAL_PADDING
        log_probs, lengths = self.model(features, num_frames, self.isolate)
        return log_probs, lengths


def load_recogniser(args: DecodeArgs) -> Recogniser:
    """The averaged model that the flags name, with its tokenizer, on the device they name; sets the CPU threads.

    Raises:
        CheckpointError, ConfigError: files that are missing or do not fit together.
        ValueError: a GPU is wanted that is not there.
    """
    decode = args.decode
    device = choose_device(decode.device)
    if decode.num_threads:
        torch.set_num_threads(decode.num_threads)
    if decode.checkpoint is not None:
        path = decode.checkpoint
        payload = checkpoint.load(path)
        state = checkpoint.model_state(payload, path)
        if decode.use_averaged_model and payload.get("model_avg") is not None:
            averaged = checkpoint.strip_module_prefix(payload["model_avg"])
            state = {
                name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in averaged.items()
            }
    else:
        choice = checkpoint.choose_checkpoints(
            decode.exp_dir, decode.epoch, decode.iter, decode.avg, decode.use_averaged_model
        )
        path = choice.files[-1]
        payload = checkpoint.load(path)
        state = checkpoint.average_checkpoints(choice)
    config = resolve_model(stored_model_config(payload, state, path), args.given_model)
    tokenizer = _tokenizer(args.data.bpe_model, payload)
    model = build_model(config, tokenizer.vocab_size)
    checkpoint.load_model(model, state, path)
    return Recogniser(model.eval().to(device), tokenizer, config)


def stored_model_config(payload: dict[str, Any], state: checkpoint.State, path: Path) -> ModelConfig:
    """The sizes of a checkpoint's model: from its configuration, its published flags, or its tensors.

    Tensors do not tell all (a number of heads is known as a product only), so they come last.
    """
    if payload.get("config"):
        return config_from_dict(payload["config"]).model
    if "encoder_dim" in payload:
        return model_from_published(payload)
    try:
        sizes = sizes_from_state_dict(state)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from error
    names = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in sizes.items() if name in names})


def _tokenizer(path: Path | None, payload: dict[str, Any]) -> PhoneTokenizer:
    if path is not None:
        return PhoneTokenizer.from_model(path)
    if payload.get("tokenizer"):
        return PhoneTokenizer.from_bytes(payload["tokenizer"])
    return PhoneTokenizer.from_table()


def choose_test_sets(wanted: Sequence[str], data_config: Path) -> dict[str, Path]:
    """Name and folder of each set to decode.

    Args:
        wanted: shar folders (with a slash in their name), names of sets of the data config, or the words "dev" and
            "test" for all its sets of that kind; none means "test".
        data_config: read where it is needed.

    Raises:
        ValueError: a name that is none of these, or nothing to decode.
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
    # Two parts of a path tell sets of several corpora apart.
    return chosen | {"-".join(Path(name).parts[-2:]).strip("/"): Path(name) for name in wanted if "/" in name}


def eval_loader(args: DecodeArgs, folder: Path, keep_alignment: bool = False) -> BatchLoader:
    """A loader of one of these sets, with the true times of its phones if asked for."""
    return build_eval_loader(
        [folder],
        max_duration=args.data.max_duration,
        num_workers=args.data.num_workers,
        need_text=False,
        keep_alignment=keep_alignment,
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
