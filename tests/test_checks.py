"""Every rule of a configuration, and that all problems come at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zipformer_crctc.checks import AT_LEAST, AT_MOST, CHOICES, POSITIVE, check_config, check_decode, validate
from zipformer_crctc.config import Config, ConfigError, DataConfig, DecodeConfig, ModelConfig, TrainConfig
from zipformer_crctc.flags import field_kinds


def config_with(**values: Any) -> Config:
    """The default configuration with some fields replaced, whichever section they are in."""
    parts = {}
    for name, part in vars(Config()).items():
        own = {key: value for key, value in values.items() if key in field_kinds(type(part))}
        parts[name] = replace(part, **own)
    return Config(**parts)


def test_defaults_are_valid() -> None:
    validate(Config())
    validate(config_with(causal=True))


def test_tables_name_real_fields() -> None:
    known = {name for cls in (ModelConfig, DataConfig, TrainConfig, DecodeConfig) for name in field_kinds(cls)}
    assert {*AT_LEAST, *AT_MOST, *CHOICES, *POSITIVE} <= known


def test_every_number_has_a_rule() -> None:
    free = {"spec_aug_time_warp_factor", "chunk_size", "left_context_frames", "subset"}
    free |= {"insertion_bonus", "blank_penalty"}  # either sign makes sense
    for cls in (ModelConfig, DataConfig, TrainConfig, DecodeConfig):
        for name, kind in field_kinds(cls).items():
            if kind in (int, float, float | None, tuple[int, ...]) and name not in free:
                assert name in AT_LEAST or name in POSITIVE, name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_duration": 0}, ["--max-duration 0", "1 or more"]),
        ({"base_lr": 0.0}, ["--base-lr 0.0", "above 0"]),
        ({"lr_epochs": float("inf")}, ["--lr-epochs inf", "finite"]),
        ({"grad_accumulation": float("nan")}, ["--grad-accumulation nan", "finite"]),
        ({"grad_accumulation": 1.5}, ["--grad-accumulation 1.5", "whole number", "give 2"]),
        ({"grad_accumulation": 0.0}, ["--grad-accumulation 0.0", "1 or more"]),
        ({"master_port": 70000}, ["--master-port 70000", "65535"]),
        ({"device": "tpu"}, ["--device tpu", "auto or cpu or cuda"]),
        ({"input_strategy": "PrecomputedFeatures"}, ["--input-strategy PrecomputedFeatures", "AudioSamples"]),
        ({"precision": "fp16", "device": "cpu"}, ["--precision fp16", "fp32"]),
        ({"use_transducer": True}, ["--use-transducer True", "not there yet"]),
        ({"use_attention_decoder": True}, ["--use-attention-decoder True", "not there yet"]),
        ({"use_ctc": False, "use_cr_ctc": False}, ["--use-ctc False", "only head"]),
        ({"use_cr_ctc": False, "use_unsup_cr_ctc": True}, ["--use-unsup-cr-ctc True", "--use-cr-ctc True"]),
        ({"concatenate_cuts": True}, ["--concatenate-cuts True", "not there yet"]),
        ({"enable_spec_aug": True}, ["--enable-spec-aug True", "--use-cr-ctc False"]),
        ({"full_libri": False, "subset": 30}, ["--subset 30", "25, 50 or 75"]),
        ({"save_every_n": 100}, ["--save-every-n 100", "--average-period 200"]),
        ({"start_epoch": 31}, ["--start-epoch 31", "--num-epochs 30"]),
        ({"start_batch": 10, "num_steps": 10}, ["--start-batch 10", "--num-steps 10"]),
        ({"num_heads": (4, 4)}, ["--num-heads 4,4", "2 values for 6 stacks"]),
        ({"encoder_unmasked_dim": (200,)}, ["--encoder-unmasked-dim 200", "--encoder-dim 192"]),
        ({"cnn_module_kernel": (30,)}, ["--cnn-module-kernel 30", "odd"]),
        ({"pos_dim": 47}, ["--pos-dim 47", "even", "give 48"]),
        ({"frontend_channels": (8, 32)}, ["--frontend-channels 8,32", "3 values"]),
        ({"causal": True, "chunk_size": (20,), "left_context_frames": (200,)}, ["--chunk-size 20", "multiple of 8"]),
        (
            {"causal": True, "chunk_size": (16,), "left_context_frames": (16,)},
            ["--left-context-frames 16", "56 frames"],
        ),
        ({"causal": True, "chunk_size": (0,)}, ["--chunk-size 0", "or -1"]),
    ],
)
def test_each_rule(values: dict[str, Any], words: list[str]) -> None:
    (problem,) = check_config(config_with(**values))
    for word in words:
        assert word in problem


def test_ctc_is_needed_for_cr_ctc() -> None:
    problems = check_config(config_with(use_ctc=False))
    assert any("--use-cr-ctc True needs --use-ctc True" in problem for problem in problems)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        validate(config_with(pos_dim=47, max_duration=0, seed=-1))
    assert len(error.value.problems) == 3
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("method", ["1best", "nbest-oracle", "attention-decoder-rescoring-no-ngram"])
def test_methods_with_a_lexicon_are_refused(method: str) -> None:
    (problem,) = check_decode(DecodeConfig(decoding_method=method), DataConfig(), {})
    assert f"--decoding-method {method}" in problem and "lexicon" in problem and "ctc-prefix-beam-search" in problem


@pytest.mark.parametrize("method", ["ctc-decoding", "nbest"])
def test_lattice_methods_need_k2(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = check_decode(DecodeConfig(decoding_method=method, nbest=20), DataConfig(), {})
    assert f"--decoding-method {method}: needs the package k2" in problem
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert check_decode(DecodeConfig(decoding_method=method, nbest=20), DataConfig(), {}) == []
    problems = check_decode(DecodeConfig(decoding_method="nbest", nbest=20, num_paths=10), DataConfig(), {})
    assert "--nbest 20: must not be above --num-paths 10" in problems[0]


def test_decoding_rules() -> None:
    def problems(given: dict[str, Any] | None = None, **values: Any) -> list[str]:
        return check_decode(DecodeConfig(**values), DataConfig(), given or {})

    assert problems({"encoder_dim": (96,), "query_head_dim": (16,)}) == []
    assert "unknown" in problems(decoding_method="beam")[0]
    assert "--avg 15 with --epoch 10" in problems(epoch=10)[0]
    assert problems(epoch=10, use_averaged_model=False) == problems(iter=10) == []
    assert "one value" in problems({"causal": True, "chunk_size": (16, 32)})[0]
    beam = "ctc-prefix-beam-search"
    assert problems(iter=20, decoding_method=beam, beam=4, nbest=4, insertion_bonus=-1.0, blank_penalty=-1.0) == []
    assert "--beam 3" in problems(iter=20, decoding_method=beam, beam=3)[0]
    assert "--beam 65" in problems(iter=20, decoding_method=beam, beam=65)[0]
    assert "--nbest 17" in problems(iter=20, decoding_method=beam, nbest=17)[0]
    assert "--inventory nowhere" in problems(iter=20, inventory=Path("nowhere"))[0]
    assert "--lm nowhere" in problems(iter=20, decoding_method=beam, lm=Path("nowhere"))[0]
    assert beam in problems(iter=20, lm=Path(__file__))[0]
    assert "--encoder-dim 0" in problems({"encoder_dim": (0,)})[0]
    assert "--precision half" in problems(iter=20, precision="half")[0]
    assert problems(iter=20, precision="bf16") == []
