"""Where the weights of a model come from: one file, the average of several, an exported folder, or a hub.

Everything is read without running code from it: checkpoints with `weights_only`, folders from safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zipformer_crctc import checkpoint
from zipformer_crctc.checkpoint import CheckpointError, State
from zipformer_crctc.config import ModelConfig, config_from_dict, model_from_published
from zipformer_crctc.model_sizes import sizes_from_state_dict
from zipformer_crctc.tokenizer import PhoneTokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.model"
TOKENS_FILE = "tokens.txt"
NEWEST = 10**12
"""Above the number of any checkpoint-N.pt."""


@dataclass(frozen=True)
class Weights:
    """A model's tensors, and what else was stored with them."""

    state: State
    config: ModelConfig
    tokenizer: PhoneTokenizer | None
    """None where none was stored: that of the published models."""
    source: Path
    """A file to name in messages."""


def find_weights(name: str | Path, avg: int = 1, iter: int = 0, use_averaged_model: bool = True) -> Weights:
    """The weights behind a path or a hub id; see `PhoneRecognizer.from_pretrained`.

    Raises CheckpointError for what is missing or cannot be used.
    """
    path = Path(name)
    if path.is_file():
        return file_weights(path, use_averaged_model)
    if path.is_dir():
        return folder_weights(path, avg, iter, use_averaged_model)
    parts = str(name).split("/")
    if len(parts) < 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"{name}: no such file or folder; name a checkpoint, a folder of them, or a hub id (A/B)")
    downloaded = _from_hub("/".join(parts[:2]), "/".join(parts[2:]))
    return find_weights(downloaded, avg, iter, use_averaged_model)


def file_weights(path: Path, use_averaged_model: bool = True) -> Weights:
    """The weights of one checkpoint: its running average if it is to be used and there is one, else the model."""
    payload = checkpoint.load(path)
    state = checkpoint.model_state(payload, path)
    if use_averaged_model and payload.get("model_avg") is not None:
        averaged = checkpoint.strip_module_prefix(payload["model_avg"])
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in averaged.items()}
    return _weights(payload, state, path)


def average_weights(choice: checkpoint.Choice) -> Weights:
    """The average of several checkpoints of a run."""
    path = choice.files[-1]
    return _weights(checkpoint.load(path), checkpoint.average_checkpoints(choice), path)


def folder_weights(folder: Path, avg: int = 1, iter: int = 0, use_averaged_model: bool = True) -> Weights:
    """An exported folder, else the average of the last checkpoint-N.pt, else the only .pth or .pt file.

    A folder with a single checkpoint-N.pt, or whose files hold no running average, is averaged without that.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return exported_weights(folder)
    if found := checkpoint.find_checkpoints(folder, iter or None):
        last = checkpoint.load(found[-1][1])
        by_running_average = use_averaged_model and last.get("model_avg") is not None
        if by_running_average and len(found) == avg == 1:
            return file_weights(found[-1][1])
        return average_weights(checkpoint.choose_checkpoints(folder, 0, iter or NEWEST, avg, by_running_average))
    files = sorted(path for pattern in ("*.pth", "*.pt") for path in folder.glob(pattern))
    if len(files) == 1:
        return file_weights(files[0], use_averaged_model)
    listed = ", ".join(path.name for path in files[:10]) or "none"
    raise CheckpointError(
        f"{folder}: holds neither {WEIGHTS_FILE} nor checkpoint-N.pt" + (f" with N up to {iter}" if iter else "") + ", "
        f"and of .pth and .pt files: {listed}; name one file"
    )


def exported_weights(folder: Path) -> Weights:
    """A folder with config.json, model.safetensors and tokenizer.model or tokens.txt.

    The fields of `ModelConfig` stand in config.json by their names, within `sizes` where save_pretrained.py wrote it;
    others are ignored, and sizes that are absent are read from the tensors. Names of tensors may have the prefix
    `model.`.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: reading it needs the package safetensors; pip install 'zipformer-crctc[hf]'"
        ) from error
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: not a safetensors file, or a damaged one ({error})") from error
    if all(name.startswith("model.") for name in state):
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    try:
        stored = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        stored = stored.get("sizes", stored)
        named = {field.name for field in fields(ModelConfig)} & set(stored)
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value := stored[name], list) else value for name in named
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: cannot be read as a JSON object ({error})") from error
    complete = "num_encoder_layers" in given and "num_heads" in given
    config = ModelConfig(**given) if complete else _config_of_tensors(state, folder / WEIGHTS_FILE)
    tokenizer = None
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = PhoneTokenizer.from_model(folder / TOKENIZER_FILE)
    elif (folder / TOKENS_FILE).is_file():
        tokenizer = PhoneTokenizer.from_tokens(folder / TOKENS_FILE)
    return Weights(state, config, tokenizer, folder / WEIGHTS_FILE)


def _weights(payload: Mapping[str, Any], state: State, path: Path) -> Weights:
    tokenizer = PhoneTokenizer.from_bytes(payload["tokenizer"]) if payload.get("tokenizer") else None
    return Weights(state, _stored_config(payload, state, path), tokenizer, path)


def _stored_config(payload: Mapping[str, Any], state: State, path: Path) -> ModelConfig:
    """The sizes of a checkpoint's model: from its configuration, its published flags, or its tensors.

    Tensors do not tell all (a number of heads is known as a product only), so they come last.
    """
    if payload.get("config"):
        return config_from_dict(payload["config"]).model
    if "encoder_dim" in payload:
        return model_from_published(payload)
    return _config_of_tensors(state, path)


def _config_of_tensors(state: State, path: Path) -> ModelConfig:
    try:
        sizes = sizes_from_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    names = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in sizes.items() if name in names})


def _from_hub(repository: str, file: str) -> Path:
    """An exported folder, or one file, of a repository on the Hugging Face Hub; downloaded, or from the hub's cache."""
    missing = f"{repository}: no such file or folder"
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{missing}, and to fetch it from the Hugging Face Hub the package huggingface_hub is needed; correct the "
            "path, or pip install 'zipformer-crctc[hf]'"
        ) from error
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        wanted = [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, TOKENS_FILE]
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # of its own, of the network and of the file system
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{missing}, and it cannot be had from the Hugging Face Hub ({first_line}); correct the path, or copy the "
            "model here"
        ) from error
    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{repository}: the repository has no {WEIGHTS_FILE}; name one of its checkpoints, as {repository}/FILE.pth"
        )
    return folder
