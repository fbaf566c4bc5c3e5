"""A recogniser that runs an ONNX file by onnxruntime; the only module that runs them.

N utterances, T feature frames or samples, T' output frames, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipformer_crctc.loader import Batch


class OnnxModel:
    """A file that onnx_files.py wrote.

    Args:
        path: the file.
        num_threads: CPU threads; 0 leaves the choice to onnxruntime.

    Raises:
        ValueError: onnxruntime is not installed, or the file is not there.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | Path, num_threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"{path}: running it needs onnxruntime: pip install '.[onnx]'") from error
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; export_onnx.py writes ONNX files")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        """What the file says about itself; `inputs` is features or audio."""

    @property
    def factor(self) -> int:
        """The model's output downsampling factor."""
        return int(self.metadata["subsampling_factor"]) // 2

    def __call__(self, data: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, T, 80) or samples (N, T), and their lengths (N,), to log-probs (N, T', V) and lengths (N,)."""
        feed: dict[str, Any] = dict(zip(self._names, (data.numpy(), lengths.numpy().astype(np.int64)), strict=True))
        log_probs, num_frames = self._session.run(None, feed)
        return torch.from_numpy(log_probs), torch.from_numpy(num_frames)

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `Recogniser.log_probs`, for files that take features."""
        return self(batch.features, batch.num_frames)
