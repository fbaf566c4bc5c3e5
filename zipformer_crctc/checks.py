"""What a configuration must satisfy. Each check returns sentences that name the flag, the value and the remedy."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any

from zipformer_crctc.config import (
    BEAM_SEARCH,
    BEST_PATH,
    GREEDY_SEARCH,
    NBEST,
    STACK_FIELDS,
    Config,
    DataConfig,
    DecodeConfig,
)
from zipformer_crctc.flags import flag_name, format_value, raise_if_any

# Bounds of a number or of each item of a list. A time mask ratio above 6 would ask for most of the frames.
AT_LEAST: dict[str, float] = {
    **dict.fromkeys(STACK_FIELDS, 1),
    **dict.fromkeys(("pos_dim", "frontend_channels", "frontend_hidden", "output_downsampling_factor"), 1),
    **dict.fromkeys(("max_duration", "num_buckets", "world_size", "num_epochs", "start_epoch"), 1),
    **dict.fromkeys(("average_period", "save_every_n", "keep_last_k", "log_interval", "valid_interval"), 1),
    **dict.fromkeys(("max_skipped_steps", "grad_accumulation", "master_port", "epoch", "avg", "duration_factor"), 1),
    **dict.fromkeys(("num_workers", "num_threads", "seed", "num_steps", "start_batch", "iter", "gap"), 0),
    **dict.fromkeys(("cr_loss_scale", "cr_loss_masked_scale", "unsup_cr_ctc_loss_scale", "time_mask_ratio"), 0),
    **dict.fromkeys(("clip_grad_norm", "lr_warmup_batches", "plain_ctc_batches", "speed_perturbation"), 0),
    **dict.fromkeys(("lm_weight", "top_tokens", "blank_skip"), 0),
    "nbest": 1,
    "num_paths": 1,
    "beam": 4,
}
AT_MOST = {
    "master_port": 65535,
    "speed_perturbation": 0.5,
    "time_mask_ratio": 6,
    "seed": 2**31 - 1,
    "beam": 64,
    "blank_skip": 1,
}
POSITIVE = (
    *("nbest_scale", "quadratic_duration", "warmup_batches", "base_lr", "lr_batches", "lr_epochs", "ref_duration"),
    "process_timeout",
)
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "fbank_device": ("workers", "model"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "input_strategy": ("AudioSamples",),
    "resume": ("no", "auto"),
}
# Values whose feature is not there yet: (field, value) -> sentence.
UNSUPPORTED = {
    ("use_transducer", True): "the transducer head is not there yet; give False.",
    ("use_attention_decoder", True): "the attention decoder is not there yet; give False.",
    ("use_ctc", False): "CTC is the only head that is there; give True.",
    ("concatenate_cuts", True): "concatenation of utterances is not there yet; give False.",
}
SEARCH_FIELDS = (
    *("decoding_method", "beam", "nbest", "lm", "lm_weight", "insertion_bonus", "top_tokens", "blank_skip"),
    *("inventory", "blank_penalty", "num_paths", "nbest_scale"),
)
"""Fields of DecodeConfig that set the search."""
OUTPUT_FORMATS = ("jsonl", "ctm", "textgrid", "srt")
METHODS = (GREEDY_SEARCH, BEAM_SEARCH, BEST_PATH, NBEST)
LEXICON_METHODS = (
    "1best",
    "nbest-rescoring",
    "whole-lattice-rescoring",
    "nbest-oracle",
    "attention-decoder-rescoring-no-ngram",
    "attention-decoder-rescoring-with-ngram",
)


def validate(config: Config) -> None:
    """Raise one ConfigError with everything that is wrong with a training configuration."""
    raise_if_any(check_config(config))


def check_config(config: Config) -> list[str]:
    """Problems of a whole training configuration."""
    values = {**vars(config.model), **vars(config.data), **vars(config.train)}
    return [*check_values(values), *check_model(vars(config.model)), *_check_data(values), *_check_train(values)]


def check_values(values: Mapping[str, Any]) -> list[str]:
    """Problems that one value has by itself: range, choice, feature that is not there."""
    return [problem for name, value in values.items() for problem in _check_value(name, value)]


def _check_value(name: str, value: Any) -> Iterator[str]:
    given = f"{flag_name(name)} {format_value(value)}"
    numbers = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, int | float)]
    if not all(math.isfinite(number) for number in numbers):
        yield f"{given}: must be finite."
        return
    if (low := AT_LEAST.get(name)) is not None and any(number < low for number in numbers):
        yield f"{given}: must be {low:g} or more."
    if (high := AT_MOST.get(name)) is not None and any(number > high for number in numbers):
        yield f"{given}: must be {high} or less."
    if name in POSITIVE and any(number <= 0 for number in numbers):
        yield f"{given}: must be above 0."
    if (choices := CHOICES.get(name)) and value not in choices:
        yield f"{given}: must be {' or '.join(choices)}."
    if isinstance(value, bool) and (sentence := UNSUPPORTED.get((name, value))):
        yield f"{given}: {sentence}"


def check_model(values: Mapping[str, Any]) -> list[str]:
    """Problems between model sizes. Fields may be absent (sizes given for decoding); their rules are passed over."""
    problems = list(_check_stacks(values))
    if values.get("pos_dim", 2) % 2:
        problems.append(
            f"--pos-dim {values['pos_dim']}: must be even (sines and cosines); give {values['pos_dim'] + 1}."
        )
    kernels = values.get("cnn_module_kernel", ())
    if any(kernel % 2 == 0 for kernel in kernels):
        problems.append(f"--cnn-module-kernel {format_value(kernels)}: must be odd; add 1 to the even ones.")
    if len(channels := values.get("frontend_channels", (1, 1, 1))) != 3:
        problems.append(f"--frontend-channels {format_value(channels)}: give 3 values, one per convolution.")
    if values.get("causal") or "causal" not in values:
        problems += _check_chunks(values)
    if values.get("use_cr_ctc") and values.get("use_ctc") is False:
        problems.append("--use-cr-ctc True needs --use-ctc True.")
    if values.get("use_unsup_cr_ctc") and values.get("use_cr_ctc") is False:
        problems.append("--use-unsup-cr-ctc True needs --use-cr-ctc True.")
    return problems


def _check_stacks(values: Mapping[str, Any]) -> Iterator[str]:
    lists = {name: values[name] for name in STACK_FIELDS if name in values}
    stacks = len(values.get("downsampling_factor", ())) or max([len(items) for items in lists.values()], default=1)
    for name, items in lists.items():
        if len(items) not in (1, stacks):
            yield (
                f"{flag_name(name)} {format_value(items)}: {len(items)} values for {stacks} stacks "
                "(as many as --downsampling-factor has); give one value, or one for each stack."
            )
    dims, unmasked = values.get("encoder_dim", ()), values.get("encoder_unmasked_dim", ())
    if any(part > whole for part, whole in zip(unmasked, dims, strict=False)):
        yield (
            f"--encoder-unmasked-dim {format_value(unmasked)}: must not be above "
            f"--encoder-dim {format_value(dims)} in any stack; lower it there."
        )


def _check_chunks(values: Mapping[str, Any]) -> Iterator[str]:
    chunks, lefts = values.get("chunk_size", ()), values.get("left_context_frames", ())
    for name, items in (("chunk_size", chunks), ("left_context_frames", lefts)):
        if any(item < 1 and item != -1 for item in items):
            yield f"{flag_name(name)} {format_value(items)}: each value must be 1 or more (frames of 20 ms), or -1."
            return
    factors, kernels = values.get("downsampling_factor", ()), values.get("cnn_module_kernel", ())
    if any(factor < 1 for factor in factors):
        return
    for chunk in sorted({item for item in chunks if item > 0}):
        if any(chunk % factor for factor in factors):
            yield (
                f"--chunk-size {chunk}: every --downsampling-factor ({format_value(factors)}) must divide it; "
                f"give a multiple of {math.lcm(*factors)}."
            )
        needed = max((kernel // 2 * factor for kernel, factor in zip(kernels, factors, strict=False)), default=0)
        for left in sorted({item for item in lefts if item > 0}):
            if chunk * max(1, left // chunk) < needed:
                yield (
                    f"--left-context-frames {left} with --chunk-size {chunk}: whole chunks of left context must span "
                    f"the {needed} frames that the convolutions look back; give more left context."
                )


def _check_data(values: Mapping[str, Any]) -> Iterator[str]:
    if not values["full_libri"] and values["subset"] not in (25, 50, 75):
        yield f"--subset {values['subset']}: must be 25, 50 or 75 percent; --full-libri True takes everything."
    if values["enable_spec_aug"] and values["use_cr_ctc"]:
        yield "--enable-spec-aug True: CR-CTC masks its two views itself; give False, or --use-cr-ctc False."


def _check_train(values: Mapping[str, Any]) -> Iterator[str]:
    accumulation = values["grad_accumulation"]
    if math.isfinite(accumulation) and accumulation != int(accumulation):
        yield f"--grad-accumulation {accumulation}: must be a whole number of batches; give {math.ceil(accumulation)}."
    if values["save_every_n"] < values["average_period"]:
        yield (
            f"--save-every-n {values['save_every_n']}: must not be below --average-period {values['average_period']}, "
            "or a checkpoint would hold no new average; raise the one or lower the other."
        )
    if values["num_steps"] == 0 and values["start_epoch"] > values["num_epochs"]:
        yield (
            f"--start-epoch {values['start_epoch']}: is after the last epoch, --num-epochs {values['num_epochs']}; "
            "raise --num-epochs."
        )
    if values["num_steps"] and values["start_batch"] >= values["num_steps"]:
        yield f"--start-batch {values['start_batch']}: --num-steps {values['num_steps']} is over then; raise it."
    if values["resume"] == "auto" and (values["start_batch"] > 0 or values["start_epoch"] > 1):
        yield "--resume auto: finds the checkpoint itself; leave out --start-batch and --start-epoch, or --resume."
    if values["precision"] == "fp16" and values["device"] == "cpu":
        yield "--precision fp16: a CPU trains in fp32 or bf16; give one of them or auto, or --device cuda."


def check_decode(config: DecodeConfig, data: DataConfig, given_model: Mapping[str, Any]) -> list[str]:
    """Problems of a decoding configuration and of the model flags given beside it."""
    problems = check_values({**vars(config), **vars(data), **given_model}) + check_model(given_model)
    problems += [
        f"--output-formats {name}: unknown; give any of {','.join(OUTPUT_FORMATS)}."
        for name in config.output_formats
        if name not in OUTPUT_FORMATS
    ]
    method = config.decoding_method
    if method in LEXICON_METHODS:
        problems.append(
            f"--decoding-method {method}: needs a graph of a lexicon or a second decoder, which phone recognition here "
            f"does without; give one of {', '.join(METHODS)}; {BEAM_SEARCH} takes a language model, --lm."
        )
    elif method not in METHODS:
        problems.append(f"--decoding-method {method}: unknown; give one of {', '.join(METHODS)}.")
    elif method in (BEST_PATH, NBEST) and importlib.util.find_spec("k2") is None:
        problems.append(
            f"--decoding-method {method}: needs the package k2, which is not installed; install a wheel of it that was "
            f"built for your PyTorch, or give {BEAM_SEARCH}."
        )
    if method != BEAM_SEARCH and config.lm is not None:
        problems.append(f"--lm {config.lm}: {method} takes none; give --decoding-method {BEAM_SEARCH}.")
    if method == NBEST and config.nbest > config.num_paths:
        problems.append(f"--nbest {config.nbest}: must not be above --num-paths {config.num_paths}; raise that one.")
    if method == BEAM_SEARCH and config.nbest > config.beam:
        problems.append(
            f"--nbest {config.nbest}: must not be above --beam {config.beam}; raise the one or lower the other."
        )
    for name in ("lm", "inventory"):
        if (path := getattr(config, name)) is not None and not path.is_file():
            problems.append(f"{flag_name(name)} {path}: no such file; correct the path.")
    by_epoch = config.checkpoint is None and config.iter == 0
    if by_epoch and config.use_averaged_model and config.avg >= config.epoch:
        problems.append(
            f"--avg {config.avg} with --epoch {config.epoch}: the average starts at their difference, which must be "
            "1 or more; give a smaller --avg, or --use-averaged-model False."
        )
    return problems + check_decode_chunks(given_model)


def check_full_precision(config: DecodeConfig) -> list[str]:
    """A sentence for --precision, for programs that write a model."""
    if config.precision == "fp32":
        return []
    return [f"--precision {config.precision}: is of programs that use a model, this one writes it; leave it out."]


def check_no_search(config: DecodeConfig) -> list[str]:
    """A sentence for each flag of the search that was set, for programs that do not search as decode.py does."""
    default = DecodeConfig()
    return [
        f"{flag_name(name)} {format_value(getattr(config, name))}: only decode.py searches in this way; leave it out."
        for name in SEARCH_FIELDS
        if getattr(config, name) != getattr(default, name)
    ]


def check_decode_chunks(given_model: Mapping[str, Any]) -> list[str]:
    """A causal model decodes with one chunk size and one left context."""
    if not given_model.get("causal"):
        return []
    return [
        f"{flag_name(name)} {format_value(given_model[name])}: a causal model decodes with one value; give one."
        for name in ("chunk_size", "left_context_frames")
        if len(given_model.get(name, (-1,))) != 1
    ]
