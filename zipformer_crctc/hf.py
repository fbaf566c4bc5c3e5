"""The model and its features as transformers classes: what the files in a saved folder lead to.

The only module that knows transformers. N utterances, S samples, T feature frames, T' output frames, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import cached_file

from zipformer_crctc.config import ModelConfig
from zipformer_crctc.features import LOG_EPS, SAMPLING_RATE, Fbank
from zipformer_crctc.flags import from_plain, raise_if_any, to_plain
from zipformer_crctc.frontend import MIN_FEATURE_FRAMES, padding_mask
from zipformer_crctc.model import build_model
from zipformer_crctc.pretrained import TOKENIZER_FILE
from zipformer_crctc.recogniser import Recogniser, with_silence
from zipformer_crctc.search import greedy_search
from zipformer_crctc.tokenizer import PhoneTokenizer

REMOTE_MODULE = "zipformer_crctc_remote"
"""Name of the Python file in a saved folder, which imports this module."""
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ZipformerCrctcConfig(PretrainedConfig):
    """Sizes of the model.

    Args:
        sizes: the fields of ModelConfig, as plain data.
        vocab_size: V.
    """

    model_type = "zipformer_crctc"

    def __init__(self, sizes: dict[str, Any] | None = None, vocab_size: int = 127, **kwargs: Any) -> None:
        self.sizes = to_plain(ModelConfig()) if sizes is None else sizes
        self.vocab_size = vocab_size
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The sizes as ModelConfig; raises ConfigError for fields that it does not have."""
        problems: list[str] = []
        config = from_plain(ModelConfig, self.sizes, "config.json: sizes", problems)
        raise_if_any(problems)
        return config


class ZipformerCrctcForCTC(PreTrainedModel):
    """The recogniser; utterances get what they get alone, whatever else is in the batch.

    It computes no loss: training is train.py's.
    """

    config_class = ZipformerCrctcConfig
    main_input_name = "input_features"
    base_model_prefix = "model"

    def __init__(self, config: ZipformerCrctcConfig) -> None:
        super().__init__(config)
        self.model = build_model(config.model_config(), config.vocab_size)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The modules initialise themselves."""

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True, **_: Any
    ) -> CausalLMOutput | tuple[Tensor]:
        """Log-probabilities.

        Args:
            input_features: (N, T, 80), padded with ln(1e-10) as the processor does.
            attention_mask: (N, T), 1 at frames of the utterance; None for utterances of T frames.

        Returns:
            logits (N, T', V), log-probabilities; frames beyond an utterance are blank (0) for sure.
        """
        if attention_mask is None:
            num_frames = torch.full((len(input_features),), input_features.shape[1], device=input_features.device)
        else:
            num_frames = attention_mask.sum(dim=1)
        if self.model.encoder.causal:
            input_features, num_frames = with_silence(input_features, num_frames)
        logits, lengths = self.model(input_features.to(self.dtype), num_frames, isolate=True)
        beyond = padding_mask(lengths, logits.shape[1])[:, :, None]
        blank = torch.arange(logits.shape[2], device=logits.device) == PhoneTokenizer.blank_id
        logits = torch.where(beyond, torch.where(blank, 0.0, float("-inf")), logits)
        return CausalLMOutput(logits=logits) if return_dict else (logits,)


class ZipformerCrctcProcessor(ProcessorMixin):
    """Samples to features, ids to phones.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PhoneTokenizer) -> None:
        self.phone_tokenizer = tokenizer
        self.fbank = Fbank()
        self.chat_template = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ZipformerCrctcProcessor:
        """Load from a saved folder, or one on the Hugging Face hub."""
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        return cls(
            PhoneTokenizer.from_model(cached_file(str(pretrained_model_name_or_path), TOKENIZER_FILE, **options))
        )

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the tokenizer and what AutoProcessor looks for."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_bytes(self.phone_tokenizer.proto)
        name = type(self).__name__
        found = {"processor_class": name, "auto_map": {"AutoProcessor": f"{REMOTE_MODULE}.{name}"}}
        (folder / "processor_config.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def __call__(
        self, audio: Any, sampling_rate: int | None = None, return_tensors: str = "pt", **_: Any
    ) -> BatchFeature:
        """Features of one or several utterances.

        Args:
            audio: samples (S,) in [-1, 1], or a list of such arrays.
            sampling_rate: of the audio; only 16000 Hz fits.
            return_tensors: pt or np.

        Returns:
            input_features (N, T, 80) and attention_mask (N, T).

        Raises:
            ValueError: another sampling rate, or audio shorter than the model takes.
        """
        if sampling_rate not in (None, SAMPLING_RATE):
            raise ValueError(f"sampling_rate {sampling_rate}: the model hears {SAMPLING_RATE} Hz; resample the audio")
        several = isinstance(audio, Sequence) and len(audio) > 0 and not np.isscalar(audio[0])
        waveforms = [torch.as_tensor(np.asarray(one), dtype=torch.float32) for one in (audio if several else [audio])]
        rows = self.fbank.batch(waveforms)
        for i, (row, waveform) in enumerate(zip(rows, waveforms, strict=True)):
            if len(row) < MIN_FEATURE_FRAMES:
                seconds = len(waveform) / SAMPLING_RATE
                raise ValueError(f"audio {i}: {seconds:.3f} s are too short, the model needs 0.085 s at least")
        features = pad_sequence(rows, batch_first=True, padding_value=LOG_EPS)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (~padding_mask(lengths, features.shape[1])).long()
        return BatchFeature({"input_features": features, "attention_mask": mask}, tensor_type=return_tensors)

    def batch_decode(self, ids: Tensor | np.ndarray | Sequence[Sequence[int]], **_: Any) -> list[str]:
        """Phones, with spaces between, of the best id of each frame (N, T')."""
        return [self.decode(row) for row in ids]

    def decode(self, ids: Tensor | np.ndarray | Sequence[int], **_: Any) -> str:
        """Phones, with spaces between, of the best id of each frame (T',): repeats merged, blanks dropped."""
        row = torch.as_tensor(np.asarray(ids)).long()
        path = torch.nn.functional.one_hot(row, self.phone_tokenizer.vocab_size).float()
        (best,) = greedy_search(path[None], torch.tensor([len(row)]), self.phone_tokenizer.blank_id)
        return " ".join(self.phone_tokenizer.phones(best.tokens))


def to_transformers(recogniser: Recogniser) -> tuple[ZipformerCrctcForCTC, ZipformerCrctcProcessor]:
    """A trained model and its tokenizer as transformers objects, with the weights shared."""
    config = ZipformerCrctcConfig(
        to_plain(recogniser.config),
        recogniser.tokenizer.vocab_size,
        architectures=[ZipformerCrctcForCTC.__name__],
        auto_map={
            "AutoConfig": f"{REMOTE_MODULE}.{ZipformerCrctcConfig.__name__}",
            "AutoModelForCTC": f"{REMOTE_MODULE}.{ZipformerCrctcForCTC.__name__}",
        },
    )
    with torch.device("meta"):
        model = ZipformerCrctcForCTC(config)
    model.model = recogniser.model
    return model.eval(), ZipformerCrctcProcessor(recogniser.tokenizer)
