"""A small corpus and the flags of a small run, for tests of the programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shar_folder import write_folder

SIZES = (
    *("--num-encoder-layers", "1", "--feedforward-dim", "32", "--num-heads", "2", "--query-head-dim", "8"),
    *("--value-head-dim", "6", "--encoder-dim", "24,32,32,40,32,32", "--encoder-unmasked-dim", "16"),
    *("--cnn-module-kernel", "7,7,5,5,5,7", "--frontend-channels", "4,8,16", "--frontend-hidden", "24"),
)
"""Six stacks with the published frame rates and about 0.1 M parameters."""


def write_corpus(folder: Path) -> Path:
    """A corpus of noisy tones with train, dev and test; returns its data config."""
    write_folder(folder / "train", [1.0, 1.2, 1.4, 1.1] * 6, per_shard=8, prefix="train")
    write_folder(folder / "dev", [1.0, 1.3], prefix="dev")
    write_folder(folder / "test", [1.1, 1.2, 0.9], prefix="test")
    config = folder / "data.yaml"
    config.write_text("train: [train]\ndev: {tones-dev: dev}\ntest: {tones-test: test}\nfilters: {min_tokens: 1}\n")
    return config


def train_flags(data_config: Path, exp_dir: Path, **flags: Any) -> list[str]:
    """Flags of a run of 6 batches of 6 s on a CPU; others by name, with underscores for dashes."""
    values = {
        "preset": "tiny",
        "data-config": data_config,
        "exp-dir": exp_dir,
        "device": "cpu",
        "num-threads": 1,
        "num-workers": 0,
        "num-steps": 6,
        "max-duration": 6,
        "average-period": 1,
        "save-every-n": 3,
        "valid-interval": 3,
        "log-interval": 1,
        "tensorboard": False,
        **{name.replace("_", "-"): value for name, value in flags.items()},
    }
    return [*SIZES, *(str(part) for name, value in values.items() for part in (f"--{name}", value))]


def read_metrics(exp_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in metrics.jsonl."""
    lines = (exp_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
