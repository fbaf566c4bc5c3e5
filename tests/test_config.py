"""Configuration dataclasses and their stored form."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zipformer_crctc.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    model_from_published,
)


def test_one_value_stands_for_all_stacks() -> None:
    assert ModelConfig().query_head_dim == (32,) * 6
    model = ModelConfig(downsampling_factor=(1, 2), num_encoder_layers=(3,), encoder_dim=(8, 16))
    assert model.num_stacks == 2 and model.num_encoder_layers == (3, 3) and model.pos_head_dim == (4, 4)


def test_uniform_lists_follow_a_new_number_of_stacks() -> None:
    model = ModelConfig().with_values({"downsampling_factor": (1, 2), "encoder_dim": (8, 16)})
    assert model.query_head_dim == (32, 32) and model.encoder_dim == (8, 16)
    assert model.num_heads == ModelConfig().num_heads
    assert ModelConfig().with_values({}) == ModelConfig()


def test_round_trip_through_json() -> None:
    config = Config(
        ModelConfig(causal=True),
        DataConfig(bpe_model=Path("a/b.model"), max_duration=7),
        TrainConfig(clip_grad_norm=5.0, exp_dir=Path("x")),
    )
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_stored_form_of_another_version() -> None:
    data = config_to_dict(Config())
    del data["train"]["seed"]
    assert config_from_dict(data) == Config()  # it was added since
    data["model"]["novelty"] = 1
    data["data"]["shuffle"] = "perhaps"
    with pytest.raises(ConfigError) as error:
        config_from_dict(data)
    assert len(error.value.problems) == 2
    for word in ("novelty", "data.shuffle"):
        assert word in str(error.value)


@pytest.mark.parametrize("data", [{}, {"encoder_dim": "192"}, {"model": 1, "data": 2, "train": 3}])
def test_not_our_config(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected the sections model, data, train"):
        config_from_dict(data)


def test_model_from_published_flags() -> None:
    params = {
        "encoder_dim": "96,96,96,96,96,96",
        "query_head_dim": "16",
        "causal": False,
        "exp_dir": Path("x"),
        "pos_dim": 48,
    }
    model = model_from_published(params)
    assert model.encoder_dim == (96,) * 6 and model.query_head_dim == (16,) * 6 and model.frontend_hidden == 384
    with pytest.raises(ConfigError, match="--encoder-dim 'wide' in the checkpoint"):
        model_from_published({"encoder_dim": "wide"})


def test_clipping_is_on_in_mixed_training_only() -> None:
    mixed = Config(model=ModelConfig(use_unsup_cr_ctc=True))
    assert Config().clip_norm == 0.0 and mixed.clip_norm == 100.0
    assert replace(mixed, train=TrainConfig(clip_grad_norm=0.0)).clip_norm == 0.0


@pytest.mark.parametrize(
    ("train", "device", "precision"),
    [
        (TrainConfig(), "cuda", "fp32"),
        (TrainConfig(use_fp16=True), "cuda", "bf16"),
        (TrainConfig(use_fp16=True), "cpu", "fp32"),
        (TrainConfig(precision="bf16"), "cuda", "bf16"),
        (TrainConfig(precision="fp16"), "cuda", "fp16"),
        (TrainConfig(precision="fp32"), "cuda", "fp32"),
    ],
)
def test_precision(train: TrainConfig, device: str, precision: str) -> None:
    assert train.precision_on(device) == precision
