"""The command lines of train.py and decode.py: published flags and ours -> checked configuration and warnings.

    args = parse_train_args(argv)     # args.config: Config
    args = parse_decode_args(argv)    # args.decode: DecodeConfig, args.data, args.given_model
    model = resolve_model(stored, args.given_model)   # stored: ModelConfig of the checkpoint

Both raise ConfigError with everything that is wrong, before data, checkpoints or GPUs are looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

from zipformer_crctc.checks import check_config, check_decode, check_decode_chunks, check_model
from zipformer_crctc.config import (
    BEAM_SEARCH,
    GREEDY_SEARCH,
    NBEST,
    Config,
    DataConfig,
    DecodeConfig,
    ModelConfig,
    TrainConfig,
)
from zipformer_crctc.flags import add_flags, field_docs, flag_name, format_value, raise_if_any, read_flags, to_plain
from zipformer_crctc.presets import PRESETS, SHORT_PRESETS, with_planned_schedule


@dataclass(frozen=True)
class OtherHeads:
    """Sizes of heads that are not there: accepted, because published commands give them, with a warning."""

    decoder_dim: int | None = None
    """It belongs to the transducer, which is not there yet."""
    joiner_dim: int | None = None
    """It belongs to the transducer, which is not there yet."""
    context_size: int | None = None
    """It belongs to the transducer, which is not there yet."""
    attention_decoder_dim: int | None = None
    """It belongs to the attention decoder, which is not there yet."""
    attention_decoder_num_layers: int | None = None
    """It belongs to the attention decoder, which is not there yet."""
    attention_decoder_attention_dim: int | None = None
    """It belongs to the attention decoder, which is not there yet."""
    attention_decoder_num_heads: int | None = None
    """It belongs to the attention decoder, which is not there yet."""
    attention_decoder_feedforward_dim: int | None = None
    """It belongs to the attention decoder, which is not there yet."""
    use_mask_threshold: float | None = None
    """Nothing in the published recipe uses it; pseudo-labels are filtered when they are prepared."""
    train_manifest: str | None = None
    """The training sets are listed in --data-config."""
    return_cuts: bool = True
    """Batches always carry their utterances."""


@dataclass(frozen=True)
class InertTraining:
    """Training flags that change nothing here; the defaults say what is done."""

    ctc_loss_scale: float = 1.0
    """With CTC as the only head its loss scale is 1."""
    print_diagnostics: bool = False
    """There are no diagnostics of this kind; the published program does not print them either."""
    prune_range: int | None = None
    """It belongs to the transducer, which is not there yet."""
    lm_scale: float | None = None
    """It belongs to the transducer, which is not there yet."""
    am_scale: float | None = None
    """It belongs to the transducer, which is not there yet."""
    simple_loss_scale: float | None = None
    """It belongs to the transducer, which is not there yet."""
    attention_decoder_loss_scale: float | None = None
    """It belongs to the attention decoder, which is not there yet."""


@dataclass(frozen=True)
class InertDecoding:
    """Decoding flags of methods that are not there."""

    lang_dir: str | None = None
    """Only decoding with a lexicon uses it, which is not there."""
    lm_dir: str | None = None
    """Only decoding with a lexicon uses it, which is not there; --lm takes an n-gram model of phones."""
    hlg_scale: float | None = None
    """Only decoding with a lexicon uses it, which is not there."""


# Flags that act only while another one has the value given here.
IDLE_UNLESS: dict[str, tuple[str, Any]] = {
    "subset": ("full_libri", False),
    "duration_factor": ("concatenate_cuts", True),
    "gap": ("concatenate_cuts", True),
    "num_buckets": ("bucketing_sampler", True),
    "cr_loss_scale": ("use_cr_ctc", True),
    "cr_loss_masked_scale": ("use_cr_ctc", True),
    "time_mask_ratio": ("use_cr_ctc", True),
    "unsup_cr_ctc_loss_scale": ("use_unsup_cr_ctc", True),
    "chunk_size": ("causal", True),
    "left_context_frames": ("causal", True),
    "wandb_project": ("wandb", True),
    "wandb_run": ("wandb", True),
    "num_epochs": ("num_steps", 0),
}
# Data flags that are about training batches only.
TRAINING_DATA = (
    *("full_libri", "subset", "bucketing_sampler", "num_buckets", "concatenate_cuts", "duration_factor", "gap"),
    *("quadratic_duration", "fbank_device", "shuffle", "drop_last", "enable_spec_aug", "spec_aug_time_warp_factor"),
)
# Decoding flags of the beam search.
BEAM_FLAGS = ("beam", "lm_weight", "insertion_bonus", "top_tokens", "blank_skip")
LATTICE_NBEST_FLAGS = ("num_paths", "nbest_scale")
# Model flags that may differ from the checkpoint when decoding.
FREE_AT_DECODING = ("chunk_size", "left_context_frames", "use_cr_ctc", "use_unsup_cr_ctc", "warmup_batches")


@dataclass(frozen=True)
class TrainArgs:
    """What train.py was asked to do."""

    config: Config
    warnings: tuple[str, ...]
    print_config: bool

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def data(self) -> DataConfig:
        return self.config.data

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    def to_json(self) -> str:
        """The whole configuration, for --print-config."""
        return json.dumps(to_plain(self.config), indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class DecodeArgs:
    """What decode.py was asked to do; ``given_model`` holds the model flags given, the rest is the checkpoint's."""

    decode: DecodeConfig
    data: DataConfig
    given_model: Mapping[str, Any]
    warnings: tuple[str, ...]
    print_config: bool
    own: Any = None
    """The flags that only this program has; None for decode.py."""

    def to_json(self) -> str:
        """The whole configuration, for --print-config; a model field is null where the checkpoint decides."""
        model = {field.name: self.given_model.get(field.name) for field in fields(ModelConfig)}
        parts = {"decode": to_plain(self.decode), "data": to_plain(self.data), "model": model}
        if self.own is not None:
            parts["own"] = to_plain(self.own)
        return json.dumps(parts, indent=2, ensure_ascii=False)


class ProgramArgs(Protocol):
    """What every program knows about what it was asked to do."""

    @property
    def print_config(self) -> bool: ...

    def to_json(self) -> str: ...


Args = TypeVar("Args", bound=ProgramArgs)


def run_program(name: str, parse: Callable[[], Args], run: Callable[[Args], None]) -> None:
    """What every program does: parse, and either print the configuration or run.

    A bad configuration, missing data or an unfit checkpoint ends it with status 2 and one message.
    """
    try:
        args = parse()
        if args.print_config:
            print(args.to_json())
        else:
            run(args)
    except ValueError as error:  # configuration, data and checkpoint errors
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)


def parse_train_args(argv: Sequence[str] | None = None) -> TrainArgs:
    """Configuration of train.py: the preset, with the flags given on top.

    ``argv`` is without the program's name, None for the process's own. Raises ConfigError; exits with status 2 for a
    flag that does not exist and with 0 for --help.
    """
    parser = _parser("Train a phone recogniser with CR-CTC.", ModelConfig, DataConfig, TrainConfig, InertTraining)
    parser.add_argument("--preset", default="small", help="tiny, small or large; flags given win (default: small)")
    given = vars(parser.parse_args(argv))
    problems: list[str] = []
    model, data, train, inert = (
        read_flags(given, cls, problems) for cls in (ModelConfig, DataConfig, TrainConfig, InertTraining)
    )
    if "subset" in data:
        data.setdefault("full_libri", False)
    if (preset := given["preset"]) not in PRESETS:
        problems.append(f"--preset {preset}: must be {' or '.join(PRESETS)}.")
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:  # set by torchrun
        train.setdefault("world_size", int(os.environ["WORLD_SIZE"]))
    base = PRESETS.get(preset, PRESETS["small"])()
    config = Config(base.model.with_values(model), replace(base.data, **data), replace(base.train, **train))
    if preset in SHORT_PRESETS:
        config = with_planned_schedule(config, keep=frozenset(train))
    other = read_flags(given, OtherHeads, problems)
    raise_if_any([*problems, *check_config(config)])
    warnings = [
        *_inert_warnings(OtherHeads, other),
        *_inert_warnings(InertTraining, inert),
        *_idle_warnings(config, {**model, **data, **train}),
    ]
    return TrainArgs(config, tuple(warnings), given["print_config"])


def parse_decode_args(
    argv: Sequence[str] | None = None,
    own: type | None = None,
    description: str = "Decode test sets and score them.",
    decoding_method: str = GREEDY_SEARCH,
) -> DecodeArgs:
    """Configuration of decode.py; model sizes need not be given.

    Other programs that use a trained model have the same flags, and those of the frozen dataclass ``own`` besides;
    ``decoding_method`` is their default.
    ``argv`` is without the program's name, None for the process's own. Raises ConfigError; exits with status 2 for a
    flag that does not exist and with 0 for --help.
    """
    groups = (DecodeConfig, DataConfig, ModelConfig, InertDecoding)
    parser = _parser(description, *((own,) if own is not None else ()), *groups)
    given = vars(parser.parse_args(argv))
    problems: list[str] = []
    model, data, decode = (read_flags(given, cls, problems) for cls in (ModelConfig, DataConfig, DecodeConfig))
    inert, other = (read_flags(given, cls, problems) for cls in (InertDecoding, OtherHeads))
    own_flags = own(**read_flags(given, own, problems)) if own is not None else None
    config, data_config = DecodeConfig(**{"decoding_method": decoding_method, **decode}), DataConfig(**data)
    raise_if_any([*problems, *check_decode(config, data_config, model)])
    warnings = [*_inert_warnings(OtherHeads, other), *_inert_warnings(InertDecoding, inert)]
    warnings += [f"{flag_name(name)} has no effect: it is about training." for name in TRAINING_DATA if name in data]
    if config.checkpoint is not None:
        unused = [name for name in ("epoch", "iter", "avg", "use_averaged_model") if name in decode]
        warnings += [f"{flag_name(name)} has no effect with --checkpoint." for name in unused]
    elif config.iter > 0 and "epoch" in decode:
        warnings.append(f"--epoch has no effect with --iter {config.iter}.")
    warnings += search_warnings(config, decode)
    return DecodeArgs(config, data_config, model, tuple(warnings), given["print_config"], own_flags)


def search_warnings(config: DecodeConfig, given: Collection[str]) -> list[str]:
    """A sentence for each search flag among those given that has no effect in this search."""
    warnings = []
    if config.decoding_method != BEAM_SEARCH:
        without = f"has no effect without --decoding-method {BEAM_SEARCH}."
        warnings += [f"{flag_name(name)} {without}" for name in BEAM_FLAGS if name in given]
    elif "lm_weight" in given and config.lm is None:
        warnings.append("--lm-weight has no effect without --lm.")
    if config.decoding_method not in (BEAM_SEARCH, NBEST) and "nbest" in given:
        warnings.append(f"--nbest has no effect without --decoding-method {BEAM_SEARCH} or {NBEST}.")
    if config.decoding_method != NBEST:
        without = f"has no effect without --decoding-method {NBEST}."
        warnings += [f"{flag_name(name)} {without}" for name in LATTICE_NBEST_FLAGS if name in given]
    return warnings


def resolve_model(stored: ModelConfig, given: Mapping[str, Any]) -> ModelConfig:
    """The model to decode with: the checkpoint's, with the chunk size and left context given.

    Raises ConfigError that names every size given that the checkpoint does not have.
    """
    wanted = stored.with_values(given)
    problems = [
        f"{flag_name(name)} {format_value(value)}: the checkpoint has {format_value(getattr(stored, name))}; "
        "leave the flag out or choose another checkpoint."
        for name, value in given.items()
        if name not in FREE_AT_DECODING and getattr(wanted, name) != getattr(stored, name)
    ]
    problems = problems or check_model(vars(wanted)) + check_decode_chunks(vars(wanted))
    raise_if_any(problems)
    return wanted


def _parser(description: str, *groups: type) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for cls in (*groups, OtherHeads):
        add_flags(parser, cls, (cls.__doc__ or "").splitlines()[0])
    parser.add_argument("--print-config", action="store_true", help="check all flags, print them as JSON and exit")
    return parser


def _inert_warnings(cls: type, given: Mapping[str, Any]) -> list[str]:
    """A sentence for each flag without effect, unless its value is what is done anyway."""
    defaults = {field.name: field.default for field in fields(cls)}
    return [
        f"{flag_name(name)} {format_value(value)} has no effect: {(doc := field_docs(cls)[name])[0].lower() + doc[1:]}"
        for name, value in given.items()
        if value != defaults[name]
    ]


def _idle_warnings(config: Config, given: Mapping[str, Any]) -> list[str]:
    """A sentence for each flag given that another flag's value switches off."""
    values = {**vars(config.model), **vars(config.data), **vars(config.train)}
    warnings = [
        f"{flag_name(name)} has no effect with {flag_name(switch)} {values[switch]}."
        for name, (switch, needed) in IDLE_UNLESS.items()
        if name in given and values[switch] != needed
    ]
    if "spec_aug_time_warp_factor" in given and not (values["use_cr_ctc"] or values["enable_spec_aug"]):
        warnings.append("--spec-aug-time-warp-factor has no effect without CR-CTC or --enable-spec-aug True.")
    if values["start_epoch"] > 1 and values["start_batch"] > 0:
        warnings.append(f"--start-epoch has no effect with --start-batch {values['start_batch']}.")
    return warnings
