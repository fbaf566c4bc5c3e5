"""The published command lines, ours, and what they refuse or warn about."""

import json

import pytest

from zipformer_crctc.commandline import DecodeArgs, TrainArgs, parse_decode_args, parse_train_args, resolve_model
from zipformer_crctc.config import Config, ConfigError, ModelConfig, config_from_dict
from zipformer_crctc.presets import PLANNED_CLOCK, large, tiny

SIZES = (
    "--num-encoder-layers 4,3,4,5,4,4 --feedforward-dim 768,768,1536,2048,1536,768 "
    "--encoder-dim 512,512,768,1024,768,512 --encoder-unmasked-dim 192,192,256,320,256,192 "
    "--decoder-dim 1024 --joiner-dim 1024 --query-head-dim 64 --value-head-dim 48 --num-heads 6,6,6,8,6,6 "
)
PUBLISHED_TRAIN = (
    "--world-size 2 --num-epochs 2 --start-epoch 1 --start-batch 500000 --use-fp16 1 --exp-dir DIR --causal 0 "
    "--full-libri True --max-duration 120 --use-transducer False --use-ctc True --use-cr-ctc True --base-lr 0.015 "
    f"--enable-spec-aug False --seed 2333 --wandb False {SIZES} --num-buckets 8 --num-workers 4 "
    "--unsup-cr-ctc-loss-scale 0.5 --use-unsup-cr-ctc True"
)
PUBLISHED_DECODE = (
    "--iter 800000 --avg 10 --exp-dir DIR --use-transducer False --use-ctc True --use-cr-ctc True --max-duration 600 "
    "--decoding-method ctc-greedy-search --bpe-model FILE --num-workers 1"
)
# Every flag of the published programs with its published default, where that is not refused or an error.
PUBLISHED_MODEL_FLAGS = (
    "--num-encoder-layers 2,2,3,4,3,2 --downsampling-factor 1,2,4,8,4,2 --feedforward-dim 512,768,1024,1536,1024,768 "
    "--num-heads 4,4,4,8,4,4 --encoder-dim 192,256,384,512,384,256 --query-head-dim 32 --value-head-dim 12 "
    "--pos-head-dim 4 --pos-dim 48 --encoder-unmasked-dim 192,192,256,256,256,192 "
    "--cnn-module-kernel 31,31,15,15,15,31 --causal False --chunk-size 16,32,64,-1 "
    "--left-context-frames 64,128,256,-1 --use-transducer False --use-ctc True --use-attention-decoder False "
    "--use-cr-ctc True --use-unsup-cr-ctc False --use-mask-threshold 0.8 --remove-diacritics False --decoder-dim 512 "
    "--joiner-dim 512 --attention-decoder-dim 512 --attention-decoder-num-layers 6 "
    "--attention-decoder-attention-dim 512 --attention-decoder-num-heads 8 --attention-decoder-feedforward-dim 2048 "
    "--full-libri False --subset 25 --max-duration 600 --bucketing-sampler True --num-buckets 10 "
    "--concatenate-cuts False --duration-factor 1.0 --gap 3.0 --shuffle True --drop-last True --return-cuts True "
    "--num-workers 4 --enable-spec-aug False --spec-aug-time-warp-factor 80 --input-strategy AudioSamples "
    "--train-manifest x "
)
PUBLISHED_TRAIN_FLAGS = PUBLISHED_MODEL_FLAGS + (
    "--world-size 1 --master-port 12354 --wandb False --wandb_project transducer --wandb_run zipformer-transducer "
    "--num-epochs 30 --start-epoch 1 --start-batch 0 --exp-dir zipformer/exp --bpe-model x.model --base-lr 0.045 "
    "--lr-batches 7500 --lr-epochs 3.5 --grad-accumulation 1.0 --ref-duration 600 --ctc-loss-scale 0.2 "
    "--cr-loss-scale 0.15 --unsup-cr-ctc-loss-scale 0.5 --time-mask-ratio 2.0 --cr-loss-masked-scale 1.0 --seed 42 "
    "--print-diagnostics False --inf-check False --save-every-n 4000 --keep-last-k 100 --average-period 200 "
    "--use-fp16 False --context-size 2 --prune-range 5 --lm-scale 0.25 --am-scale 0.10 --simple-loss-scale 0.5 "
    "--attention-decoder-loss-scale 0.8"
)
PUBLISHED_DECODE_FLAGS = PUBLISHED_MODEL_FLAGS + (
    "--epoch 30 --iter 0 --avg 15 --use-averaged-model True --exp-dir zipformer/exp --bpe-model x.model "
    "--decoding-method ctc-greedy-search --lang-dir data/lang_bpe_500 --lm-dir data/lm --context-size 2 "
    "--num-paths 100 --nbest-scale 1.0 --hlg-scale 0.6"
)


def train(command: str) -> TrainArgs:
    return parse_train_args(command.split())


def decode(command: str) -> DecodeArgs:
    return parse_decode_args(command.split())


@pytest.mark.parametrize("extra", ["", " --remove-diacritics True"])
def test_published_training_commands(extra: str) -> None:
    args = parse_train_args((PUBLISHED_TRAIN + extra).split())
    assert args.data.remove_diacritics is bool(extra)
    sizes = large().model
    assert args.model == sizes.with_values({"use_unsup_cr_ctc": True})
    assert (args.train.world_size, args.train.start_batch, args.train.seed) == (2, 500000, 2333)
    assert (args.train.base_lr, args.data.max_duration, args.data.num_buckets) == (0.015, 120, 8)
    assert args.config.clip_norm == 100.0 and args.train.precision_on("cuda") == "bf16"
    assert [warning.split()[0] for warning in args.warnings] == ["--decoder-dim", "--joiner-dim"]


@pytest.mark.parametrize("sizes", ["", SIZES])
def test_published_decoding_command(sizes: str) -> None:
    args = parse_decode_args(f"{PUBLISHED_DECODE} {sizes}".split())
    assert (args.decode.iter, args.decode.avg, args.data.num_workers) == (800000, 10, 1)
    assert str(args.data.bpe_model) == "FILE"
    assert len(args.warnings) == (2 if sizes else 0)
    assert ("encoder_dim" in args.given_model) is bool(sizes)
    assert resolve_model(large().model, args.given_model) == large().model


def test_world_size_alone() -> None:
    args = parse_train_args(["--world-size", "2"])
    assert args.warnings == () and not args.print_config
    assert args.train.world_size == 2 and args.model == ModelConfig()
    assert args.model.use_cr_ctc and args.model.use_ctc and not args.model.use_transducer
    assert args.data.full_libri and not args.data.enable_spec_aug and not args.train.wandb


def test_every_published_flag_is_accepted() -> None:
    args = train(PUBLISHED_TRAIN_FLAGS)
    assert args.model == ModelConfig() and not args.data.full_libri
    warned = {warning.split()[0] for warning in args.warnings}
    assert {"--ctc-loss-scale", "--use-mask-threshold", "--train-manifest", "--prune-range", "--lm-scale"} <= warned
    assert not warned & {"--print-diagnostics", "--return-cuts", "--cr-loss-masked-scale", "--input-strategy"}
    warned = {warning.split()[0] for warning in decode(PUBLISHED_DECODE_FLAGS).warnings}
    assert {"--lang-dir", "--hlg-scale", "--num-paths"} <= warned


@pytest.mark.parametrize(
    ("argv", "warning"),
    [
        ("--ctc-loss-scale 0.5", "--ctc-loss-scale 0.5 has no effect: with CTC as the only head"),
        ("--print-diagnostics True", "--print-diagnostics True has no effect: there are"),
        ("--subset 50 --full-libri True", "--subset has no effect with --full-libri True"),
        ("--use-cr-ctc False --time-mask-ratio 2.5", "--time-mask-ratio has no effect with --use-cr-ctc False"),
        ("--chunk-size 16", "--chunk-size has no effect with --causal False"),
        ("--num-steps 10 --num-epochs 3", "--num-epochs has no effect with --num-steps 10"),
        ("--start-epoch 2 --start-batch 4000", "--start-epoch has no effect with --start-batch 4000"),
        ("--use-cr-ctc 0 --spec-aug-time-warp-factor 60", "--spec-aug-time-warp-factor has no effect"),
    ],
)
def test_a_flag_without_effect_is_named(argv: str, warning: str) -> None:
    (found,) = parse_train_args(argv.split()).warnings
    assert found.startswith(warning)


def test_a_subset_replaces_all_shards() -> None:
    args = parse_train_args(["--subset", "50"])
    assert (args.data.full_libri, args.data.subset, args.warnings) == (False, 50, ())


def test_all_problems_of_a_command_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        train("--preset huge --num-steps many --use-transducer True --lm-scale big --pos-dim 47")
    text = str(error.value)
    assert len(error.value.problems) == 5
    for words in ("--preset huge", "--num-steps many", "--use-transducer True", "--lm-scale big", "--pos-dim 47"):
        assert words in text


def test_unknown_and_abbreviated_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--no-such-flag", "1"], ["--world", "2"]):
        with pytest.raises(SystemExit) as stop:
            parse_train_args(argv)
        assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


def test_help_of_both_programs(capsys: pytest.CaptureFixture[str]) -> None:
    for parse, flag in ((parse_train_args, "--max-skipped-steps"), (parse_decode_args, "--test-sets")):
        with pytest.raises(SystemExit) as stop:
            parse(["--help"])
        assert stop.value.code == 0 and flag in capsys.readouterr().out


def test_print_config() -> None:
    args = train("--print-config --preset tiny")
    assert args.print_config and config_from_dict(json.loads(args.to_json())) == args.config == tiny()
    other = decode("--print-config --query-head-dim 64 --test-sets a,b")
    shown = json.loads(other.to_json())
    assert other.print_config and shown["decode"]["test_sets"] == ["a", "b"]
    assert shown["model"]["query_head_dim"] == [64] and shown["model"]["encoder_dim"] is None


def test_flags_win_over_the_preset() -> None:
    args = train("--preset tiny --num-steps 400 --lr-batches 99 --max-duration 20 --world-size 2")
    assert args.train.lr_batches == 99.0
    assert 400 * 20 * 2 / args.train.ref_duration == pytest.approx(PLANNED_CLOCK)
    assert args.train.average_period == 4
    assert args.model == tiny().model
    other = train("--preset small --num-steps 400")
    assert other.train.ref_duration == Config().train.ref_duration


def test_another_number_of_stacks() -> None:
    args = train(
        "--downsampling-factor 1,2 --num-encoder-layers 1 --feedforward-dim 64 --num-heads 2 --encoder-dim 32,48 "
        "--encoder-unmasked-dim 32 --cnn-module-kernel 15"
    )
    assert args.model.num_stacks == 2 and args.model.query_head_dim == (32, 32)


def test_sizes_that_contradict_the_checkpoint() -> None:
    given = decode("--encoder-dim 96 --num-heads 4,4,4,8,4,4").given_model
    with pytest.raises(ConfigError) as error:
        resolve_model(ModelConfig(), given)
    (problem,) = error.value.problems
    assert "--encoder-dim 96" in problem and "192,256,384,512,384,256" in problem


def test_chunks_of_a_causal_model_are_chosen_at_decoding() -> None:
    stored = ModelConfig(causal=True)
    given = decode("--causal 1 --chunk-size 32 --left-context-frames 128").given_model
    assert resolve_model(stored, given).chunk_size == (32,)
    with pytest.raises(ConfigError, match="decodes with one value"):
        resolve_model(stored, {})


def test_decoding_warnings() -> None:
    args = decode("--checkpoint a.pth --avg 3 --shuffle False")
    assert [warning.split()[0] for warning in args.warnings] == ["--shuffle", "--avg"]
    assert decode("--iter 9 --epoch 2").warnings == ("--epoch has no effect with --iter 9.",)
    beam = "--iter 20 --decoding-method ctc-prefix-beam-search"
    (warning,) = decode("--iter 20 --beam 8").warnings
    assert warning == "--beam has no effect without --decoding-method ctc-prefix-beam-search."
    assert decode(f"{beam} --beam 8 --nbest 2 --insertion-bonus 1").warnings == ()
    assert decode(f"{beam} --lm-weight 1").warnings == ("--lm-weight has no effect without --lm.",)
