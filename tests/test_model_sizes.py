from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zipformer_crctc.config import ModelConfig
from zipformer_crctc.model import build_model
from zipformer_crctc.model_sizes import sizes_from_state_dict

SPEC = Path(__file__).resolve().parents[2] / "shared" / "spec"

LARGE = ModelConfig(
    num_encoder_layers=(4, 3, 4, 5, 4, 4),
    feedforward_dim=(768, 768, 1536, 2048, 1536, 768),
    encoder_dim=(512, 512, 768, 1024, 768, 512),
    encoder_unmasked_dim=(192, 192, 256, 320, 256, 192),
    query_head_dim=(64,),
    value_head_dim=(48,),
    num_heads=(6, 6, 6, 8, 6, 6),
)
SMALL_STACKS = {
    "num_encoder_layers": (1, 2),
    "downsampling_factor": (1, 3),
    "encoder_dim": (24, 32),
    "encoder_unmasked_dim": (16, 16),
    "feedforward_dim": (40, 48),
    "num_heads": (2, 4),
    "cnn_module_kernel": (7, 5),
    "query_head_dim": (8,),
    "value_head_dim": (6,),
    "pos_head_dim": (4,),
    "frontend_channels": (2, 4, 8),
    "frontend_hidden": 12,
    "pos_dim": 16,
}


def state_of(config: ModelConfig, vocab_size: int = 40) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_model(config, vocab_size).state_dict()


@pytest.mark.parametrize(("name", "config"), [("small", ModelConfig()), ("large", LARGE)])
def test_published_models(name: str, config: ModelConfig) -> None:
    path = SPEC / f"model-params-{name}.json"
    if not path.is_file():
        pytest.skip(f"no shapes of the published models at {path}")
    shapes = json.loads(path.read_text())
    sizes = sizes_from_state_dict({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert sizes.pop("vocab_size") == 127
    assert sizes.pop("feature_dim") == 80
    assert {key: getattr(config, key) for key in sizes} == sizes


@pytest.mark.parametrize("causal", [False, True])
def test_other_models(causal: bool) -> None:
    config = ModelConfig(**SMALL_STACKS, causal=causal)  # type: ignore[arg-type]
    sizes = sizes_from_state_dict(state_of(config))
    assert sizes.pop("vocab_size") == 40 and sizes.pop("feature_dim") == 80
    assert sizes.pop("encoder_unmasked_dim") == (24, 32)  # cannot be told
    assert {key: getattr(config, key) for key in sizes} == sizes


def test_unusual_head_sizes() -> None:
    published = {
        **SMALL_STACKS,
        "query_head_dim": (32,),
        "value_head_dim": (12,),
        "pos_head_dim": (6,),
        "num_heads": (1, 1),
    }
    sizes = sizes_from_state_dict(state_of(ModelConfig(**published)))  # type: ignore[arg-type]
    assert sizes["pos_head_dim"] == (6, 6) and sizes["num_heads"] == (1, 1)
    unclear = {**SMALL_STACKS, "pos_head_dim": (6,), "num_heads": (1, 1)}
    with pytest.raises(ValueError, match=r"more than one number of heads fits .* give --num-heads"):
        sizes_from_state_dict(state_of(ModelConfig(**unclear)))  # type: ignore[arg-type]


def test_inconsistent_tensors() -> None:
    state = state_of(ModelConfig(**SMALL_STACKS))  # type: ignore[arg-type]
    name = "encoder.encoders.1.encoder.layers.0.self_attn1.in_proj.weight"
    with pytest.raises(ValueError, match="no number of heads fits all stacks"):
        sizes_from_state_dict({**state, name: torch.empty(25, 32, device="meta")})
    with pytest.raises(ValueError, match="takes 100 inputs, with 8 channels that is not the 152"):
        sizes_from_state_dict({**state, "encoder_embed.out.weight": torch.empty(24, 100, device="meta")})


def test_other_state_dicts() -> None:
    with pytest.raises(ValueError, match="not the state dict of a Zipformer model"):
        sizes_from_state_dict({"weight": torch.zeros(3)})
    state = state_of(ModelConfig(**SMALL_STACKS))  # type: ignore[arg-type]
    del state["ctc_output.1.weight"]
    with pytest.raises(ValueError, match=r"no tensor ctc_output\.1\.weight"):
        sizes_from_state_dict(state)
