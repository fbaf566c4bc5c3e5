"""The PyPI package `zipformer` 0.1.3 on the work that this project does; nothing of it is used elsewhere.

    pip download --no-deps zipformer==0.1.3 -d DIR      # then --peer DIR/zipformer-0.1.3-py3-none-any.whl

Its output rate is 25 Hz, ours 50 Hz: all but its last step is the same work.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_crctc.model import FEATURE_DIM
from zipformer_crctc.presets import PRESETS

NAME = "zipformer 0.1.3"
SIZES = ("small", "large")
UNNEEDED = {
    "atdataset": ("SpecAugment", "time_warp", "fix_random_seed"),
    "ssentencepiece": ("Ssentencepiece",),
    "kaldialign": (),
    "kaldifst": (),
}
"""What the package imports and the timed parts do not need; installed or not, they are left out."""


def why_absent(path: str | None) -> str | None:
    """The reason why the peer cannot be imported, or None."""
    if path is None:
        return None if importlib.util.find_spec("zipformer") else "is not installed, and --peer names no folder of it"
    return None if Path(path).exists() else f"is not at {path}"


@dataclass(frozen=True)
class PeerParts:
    """Classes of the package."""

    encoder: Any
    front_end: Any
    schedule: Any
    optimizer: Any


def load(path: str | None) -> PeerParts:
    """Import the parts from a wheel or a folder that holds the package, or from the installed package."""
    for name, attributes in UNNEEDED.items():
        stand_in = types.ModuleType(name)
        for attribute in attributes:
            setattr(stand_in, attribute, None)
        sys.modules[name] = stand_in
    if path is not None:
        sys.path.insert(0, path)
        package = types.ModuleType("zipformer")  # the package's own __init__ wants much more
        package.__path__ = [str(Path(path) / "zipformer")]
        sys.modules["zipformer"] = package
    from zipformer.modules import optim, scaling, subsampling, zipformer

    return PeerParts(zipformer.Zipformer, subsampling.Conv2dSubsampling, scaling.ScheduledFloat, optim.ScaledAdam)


class PeerModel(nn.Module):
    """Features to log-probabilities with the peer's parts, in the sizes of our preset.

    Args:
        parts: of the package.
        size: preset.
        vocab_size: V.
        batch_count: at which its schedules are read.
    """

    def __init__(self, parts: PeerParts, size: str, vocab_size: int, batch_count: float) -> None:
        super().__init__()
        config = PRESETS[size]().model
        dropout = parts.schedule((0.0, 0.3), (20000.0, 0.1))
        self.encoder_embed = parts.front_end(FEATURE_DIM, config.encoder_dim[0], dropout=dropout)
        self.encoder = parts.encoder(
            downsampling_factor=config.downsampling_factor,
            encoder_dim=config.encoder_dim,
            num_encoder_layers=config.num_encoder_layers,
            encoder_unmasked_dim=config.encoder_unmasked_dim,
            query_head_dim=config.query_head_dim,
            pos_head_dim=config.pos_head_dim,
            value_head_dim=config.value_head_dim,
            pos_dim=config.pos_dim,
            num_heads=config.num_heads,
            feedforward_dim=config.feedforward_dim,
            cnn_module_kernel=config.cnn_module_kernel,
            dropout=dropout,
            warmup_batches=4000.0,
            causal=False,
        )
        self.ctc_output = nn.Sequential(nn.Dropout(0.1), nn.Linear(max(config.encoder_dim), vocab_size))
        for module in self.modules():
            if hasattr(module, "batch_count"):
                module.batch_count = batch_count  # type: ignore[assignment]

    def forward(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, 80) and (N,) to (N, T', V) and the lengths (N,)."""
        x, lengths = self.encoder_embed(features, num_frames)
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        x, lengths = self.encoder(x.transpose(0, 1), lengths, padding)
        return self.ctc_output(x.transpose(0, 1)).float().log_softmax(dim=-1), lengths
