"""What a run tells: running statistics, log lines, metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zipformer_crctc.config import TrainConfig
from zipformer_crctc.objective import SUM_NAMES

logger = logging.getLogger(__name__)


class RunningSums:
    """Sums over batches that forget: each batch multiplies what was there by 1 - 1 / reset_interval.

    Sums that are not finite are left out. Nothing waits for the device until values are read.

    Args:
        reset_interval: batches.
    """

    def __init__(self, reset_interval: int = 200) -> None:
        self.keep = 1.0 - 1.0 / reset_interval
        self.sums = torch.zeros(len(SUM_NAMES))

    def add(self, sums: Tensor) -> None:
        """Take in the sums of a batch."""
        self.sums = self.sums.to(sums.device) * self.keep + torch.where(sums.isfinite(), sums, 0.0)

    def per_frame(self) -> dict[str, float]:
        """Losses in nats per output frame."""
        return losses_per_frame(self.sums)


def losses_per_frame(sums: Tensor) -> dict[str, float]:
    """Loss, ctc_loss and cr_loss over the number of output frames."""
    values = dict(zip(SUM_NAMES, sums.tolist(), strict=True))
    frames = max(values["frames"], 1.0)
    return {name: values[name] / frames for name in SUM_NAMES if name.endswith("loss")}


def format_losses(losses: Mapping[str, float]) -> str:
    """`loss=0.1234 ctc_loss=...`"""
    return " ".join(f"{name}={value:.4f}" for name, value in losses.items())


class MetricsWriter:
    """Writes numbers of the main process to metrics.jsonl and, where asked for, TensorBoard and Weights & Biases.

    Args:
        config: of the run.
        enabled: False in all processes but the main one, where nothing is written.
        run_config: nested plain data, shown by Weights & Biases.
        resumed_at: the batch that the run goes on from; what an earlier run wrote about later ones is taken back.
    """

    def __init__(self, config: TrainConfig, enabled: bool, run_config: Mapping[str, Any], resumed_at: int = 0) -> None:
        self._start = time.monotonic()
        self._file = None
        self._tensorboard = None
        self._wandb = None
        if not enabled:
            return
        config.exp_dir.mkdir(parents=True, exist_ok=True)
        path = config.exp_dir / "metrics.jsonl"
        if resumed_at:
            try:
                _keep_steps(path, resumed_at)
            except OSError as error:  # a full disk is no reason not to start
                logger.error("%s: numbers of batches after %d stay in it (%s)", path, resumed_at, error)
        self._file = path.open("a", encoding="utf-8")
        if config.tensorboard:
            self._tensorboard = _tensorboard_writer(config.exp_dir / "tensorboard", resumed_at)
        if config.wandb:
            self._wandb = _wandb_run(config, run_config)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one kind ("train", "valid", ...) after `step` batches."""
        if self._file is None:
            return
        record = {"kind": kind, "step": step, "elapsed": round(time.monotonic() - self._start, 2), **values}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                for name, value in values.items():
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:  # a full disk is no reason to stop
            logger.error("numbers of batch %d could not be written (%s)", step, error)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Write what is left."""
        try:
            if self._file is not None:
                self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
        except OSError as error:
            logger.error("the last numbers could not be written (%s)", error)
        if self._wandb is not None:
            self._wandb.finish()


def _keep_steps(path: Path, last: int) -> None:
    """Take records after step ``last`` out of a file of JSON lines, and lines that a killed process broke off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a damaged line is left out: %.60s", path, line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _tensorboard_writer(folder: Path, resumed_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard is not installed: no TensorBoard files; metrics.jsonl has the same numbers")
        return None
    return SummaryWriter(folder, purge_step=resumed_at + 1 if resumed_at else None)


def _wandb_run(config: TrainConfig, run_config: Mapping[str, Any]) -> Any:
    import wandb

    name = config.wandb_run or config.exp_dir.name
    return wandb.init(project=config.wandb_project, name=name, config=dict(run_config))


def set_up_logging(folder: Path | None, rank: int, world_size: int, name: str = "train") -> None:
    """Log to the console (main process) and to folder/log-NAME-DATE[-rank].

    Args:
        folder: of the log files; None for the console alone.
        rank, world_size: of this process.
        name: of the program.
    """
    suffix = f"-{rank}" if world_size > 1 else ""
    tag = f" [{rank}/{world_size}]" if world_size > 1 else ""
    formatter = logging.Formatter(f"%(asctime)s{tag} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        date = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        handlers.append(logging.FileHandler(folder / f"log-{name}-{date}{suffix}", encoding="utf-8"))
    if rank == 0:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
