"""Configuration of the model, the data, training and decoding. The command line is made from it (commandline.py).

Names are those of the published flags with underscores for dashes. The text under a field is its help text.
A "batch" on the schedules' clock ``b`` is a reference batch: b = batches * max_duration * world_size / ref_duration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zipformer_crctc.flags import ConfigError, coerce, field_kinds, flag_name, from_plain, raise_if_any, to_plain

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "DecodeConfig",
    "ModelConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
    "model_from_published",
]

GREEDY_SEARCH, BEAM_SEARCH = "ctc-greedy-search", "ctc-prefix-beam-search"
BEST_PATH, NBEST = "ctc-decoding", "nbest"
"""Decoding methods; the last two with k2."""
STACK_FIELDS = (
    "num_encoder_layers",
    "downsampling_factor",
    "feedforward_dim",
    "num_heads",
    "encoder_dim",
    "query_head_dim",
    "value_head_dim",
    "pos_head_dim",
    "encoder_unmasked_dim",
    "cnn_module_kernel",
)
"""Fields of ModelConfig with one value per stack; --downsampling-factor says how many stacks there are."""

MIXED_CLIP_NORM = 100.0
"""Bound on the gradient 2-norm that the published recipe has in mixed training only."""


@dataclass(frozen=True)
class ModelConfig:
    """The network and its heads. After construction every field of STACK_FIELDS holds one value per stack."""

    num_encoder_layers: tuple[int, ...] = (2, 2, 3, 4, 3, 2)
    """Layers in each stack; like the other lists per stack, one value stands for all stacks."""
    downsampling_factor: tuple[int, ...] = (1, 2, 4, 8, 4, 2)
    """Frame rate reduction of each stack, relative to the 50 Hz front-end output; gives the number of stacks."""
    feedforward_dim: tuple[int, ...] = (512, 768, 1024, 1536, 1024, 768)
    """Hidden channels of the feed-forward modules of each stack."""
    num_heads: tuple[int, ...] = (4, 4, 4, 8, 4, 4)
    """Attention heads of each stack."""
    encoder_dim: tuple[int, ...] = (192, 256, 384, 512, 384, 256)
    """Channels of each stack; the output has as many as the widest one."""
    query_head_dim: tuple[int, ...] = (32,)
    """Channels of the query and the key per head."""
    value_head_dim: tuple[int, ...] = (12,)
    """Channels of the value per head."""
    pos_head_dim: tuple[int, ...] = (4,)
    """Channels of the positional query per head."""
    pos_dim: int = 48
    """Channels of the relative positional encoding; an even number."""
    encoder_unmasked_dim: tuple[int, ...] = (192, 192, 256, 256, 256, 192)
    """Channels of each stack that the feature masks of training never touch; at most --encoder-dim."""
    cnn_module_kernel: tuple[int, ...] = (31, 31, 15, 15, 15, 31)
    """Kernel of the convolution modules in frames of the stack's rate; odd."""
    causal: bool = False
    """Causal convolutions and attention by chunks, for streaming."""
    chunk_size: tuple[int, ...] = (16, 32, 64, -1)
    """Chunk sizes drawn from in causal training, in frames of 20 ms; -1 is the whole utterance."""
    left_context_frames: tuple[int, ...] = (64, 128, 256, -1)
    """Left contexts drawn from in causal training, in frames of 20 ms; -1 is unlimited."""
    frontend_channels: tuple[int, ...] = (8, 32, 128)
    """Output channels of the three convolutions of the front-end."""
    frontend_hidden: int = 384
    """Hidden channels of the front-end's ConvNeXt block."""
    output_downsampling_factor: int = 1
    """Frames of 20 ms in an output frame: 1 as published (50 Hz), 2 as in icefall (25 Hz), which trains sooner."""
    warmup_batches: float = 4000.0
    """Reference batches over which the layers' drop rates fall, stack after stack."""
    use_transducer: bool = False
    """Transducer head: not there yet."""
    use_ctc: bool = True
    """CTC head."""
    use_attention_decoder: bool = False
    """Attention decoder head: not there yet."""
    use_cr_ctc: bool = True
    """Consistency-regularised CTC: two masked views of each utterance, and a penalty on their difference."""
    use_unsup_cr_ctc: bool = False
    """Mixed training: each step also takes a batch of the pseudo-labelled sets."""

    def __post_init__(self) -> None:
        for name in STACK_FIELDS:
            if len(values := getattr(self, name)) == 1:
                object.__setattr__(self, name, values * self.num_stacks)

    @property
    def num_stacks(self) -> int:
        """Number of encoder stacks."""
        return len(self.downsampling_factor)

    def with_values(self, given: Mapping[str, Any]) -> ModelConfig:
        """A copy with other values; lists of equal values follow a new number of stacks."""
        uniform = {name: values[:1] for name in STACK_FIELDS if len(set(values := getattr(self, name))) == 1}
        uniform.pop("downsampling_factor", None)
        return replace(self, **{**uniform, **given})


@dataclass(frozen=True)
class DataConfig:
    """Audio, texts and batches; shared by training and decoding."""

    data_config: Path = Path("data/shar.yaml")
    """YAML file with the lists train, dev, test and unsup (pseudo-labelled) of shar folders."""
    bpe_model: Path | None = None
    """SentencePiece model file of the tokenizer; without it the one of the checkpoint, else the built-in table."""
    remove_diacritics: bool = False
    """Delete diacritics from all texts in training, from the references in decoding."""
    full_libri: bool = True
    """Use all training shards; False: the share that --subset gives."""
    subset: int = 25
    """Share of the shards of each training set in percent, 25, 50 or 75; giving it implies --full-libri False."""
    max_duration: int = 600
    """Audio per batch and process in seconds: longest utterance times number of utterances."""
    quadratic_duration: float | None = None
    """Count an utterance of d seconds as d + d * d / this towards --max-duration; 15 to 40 evens out memory."""
    bucketing_sampler: bool = True
    """Batches of utterances of similar duration; False: utterances as they come."""
    num_buckets: int = 10
    """Number of duration buckets."""
    concatenate_cuts: bool = False
    """Concatenate utterances within a batch to reduce padding: not there yet."""
    duration_factor: float = 1.0
    """Longest concatenated utterance, in multiples of the longest utterance of the batch."""
    gap: float = 3.0
    """Silence between concatenated utterances in seconds."""
    shuffle: bool = True
    """Another order of the training utterances in each epoch, given by --seed."""
    drop_last: bool = True
    """Leave out the incomplete last batch of training."""
    index_dir: Path | None = None
    """Folder for the indexes of shards beside which nothing can be written; without it one in the user's cache."""
    num_workers: int = 4
    """Processes that read data, for each training or decoding process; 0 reads in the main one."""
    fbank_device: str = "workers"
    """Where training features are computed: workers (the processes that read), or model (its device, in batches)."""
    speed_perturbation: float = 0.0
    """Train on each utterance at a speed drawn from [1 - this, 1 + this]; 0.1 helps small corpora."""
    enable_spec_aug: bool = False
    """SpecAugment when data are loaded, for plain CTC; CR-CTC masks each view itself."""
    spec_aug_time_warp_factor: int = 80
    """Largest shift of time warping in frames of 10 ms; below 1 switches it off."""
    input_strategy: str = "AudioSamples"
    """Source of the features: AudioSamples computes them from the audio, the only way here."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, schedules, checkpoints and logging."""

    world_size: int = 1
    """Number of training processes, one for each GPU."""
    master_port: int = 12354
    """TCP port at which the processes meet."""
    device: str = "auto"
    """auto (GPU if there is one), cpu or cuda."""
    precision: str = "auto"
    """fp32, bf16, fp16 (GPU, with a loss scaler) or auto: bf16 on a GPU with --use-fp16 True, else fp32."""
    use_fp16: bool = False
    """Half precision on a GPU: bfloat16 unless --precision fp16."""
    num_threads: int = 0
    """CPU threads of a process; 0 leaves the choice to PyTorch."""
    process_timeout: float = 600.0
    """Seconds that processes wait for one that is gone before they end too; more than it takes to save a checkpoint."""
    exp_dir: Path = Path("zipformer/exp")
    """Folder for checkpoints and logs."""
    seed: int = 42
    """Seed of all random numbers; epoch e uses seed + e - 1."""
    num_epochs: int = 30
    """Last epoch, counted from 1."""
    num_steps: int = 0
    """End the run after this many batches, whatever the epoch; 0 ends it by --num-epochs."""
    resume: str = "no"
    """auto: go on from the newest checkpoint of --exp-dir that can be loaded, or begin where there is none; no: do as
    --start-batch and --start-epoch say."""
    start_epoch: int = 1
    """Resume from epoch-{this - 1}.pt if above 1."""
    start_batch: int = 0
    """Resume from checkpoint-{this}.pt if above 0."""
    base_lr: float = 0.045
    """Base learning rate of ScaledAdam, relative to the size of the parameters."""
    lr_batches: float = 7500.0
    """Batches after which the Eden schedule begins to fall."""
    lr_epochs: float = 3.5
    """Epochs after which the Eden schedule begins to fall."""
    lr_warmup_batches: float = 500.0
    """Batches over which the learning rate rises from half of what it would be to all of it."""
    grad_accumulation: float = 1.0
    """Batches for each optimizer step; a whole number."""
    ref_duration: float = 600.0
    """Audio of a reference batch in seconds, the unit of all training schedules."""
    clip_grad_norm: float | None = None
    """Largest 2-norm of all gradients; 0 is off. Without it 100 in mixed training, else off."""
    max_skipped_steps: int = 20
    """Stop after this many optimizer steps in a row were skipped because a loss or gradient was not finite."""
    cr_loss_scale: float = 0.15
    """Weight of the consistency loss beside the CTC loss."""
    cr_loss_masked_scale: float = 1.0
    """Weight of the consistency loss on frames whose own view is time-masked, relative to other frames."""
    unsup_cr_ctc_loss_scale: float = 0.5
    """Weight of the loss of the pseudo-labelled batch in mixed training."""
    plain_ctc_batches: int = 0
    """Begin CR-CTC training with this many batches of plain CTC: one view, not masked, at half the cost."""
    time_mask_ratio: float = 2.0
    """Amount of time masking in CR-CTC, relative to SpecAugment's 15 percent of the frames."""
    average_period: int = 200
    """Batches between updates of the running model average."""
    save_every_n: int = 4000
    """Batches between checkpoints; at least --average-period."""
    keep_last_k: int = 100
    """Number of checkpoint-N.pt files kept; those of epochs are never deleted."""
    log_interval: int = 50
    """Batches between log lines."""
    valid_interval: int = 3000
    """Batches between validations."""
    scan_oom: bool = False
    """Before training, try the largest batches of an epoch (of each length), to see whether they fit into memory."""
    dry_run: bool = False
    """Tell the size of the model, batches in an epoch, memory, and time for a step and for the run; write nothing."""
    cuda_graphs: bool = True
    """Record the passes of each batch shape on a GPU and replay them; not with --grad-accumulation, --use-unsup-cr-ctc
    or --inf-check."""
    inf_check: bool = False
    """Log modules whose outputs, and parameters whose gradients, are not finite; slow."""
    tensorboard: bool = True
    """Write TensorBoard files if the package is installed."""
    wandb: bool = False
    """Log to Weights & Biases; needs the package."""
    wandb_project: str = "zipformer-crctc"
    """Weights & Biases project."""
    wandb_run: str = ""
    """Weights & Biases run name; without it the name of --exp-dir."""

    def precision_on(self, device_type: str) -> str:
        """Precision of the forward pass on a device type ("cpu" or "cuda"): "fp32", "bf16" or "fp16"."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if device_type == "cuda" and self.use_fp16 else "fp32"


@dataclass(frozen=True)
class DecodeConfig:
    """Which checkpoint decodes what, and how."""

    checkpoint: Path | None = None
    """One checkpoint file to use as it is, e.g. a published averaged .pth; replaces --epoch, --iter and --avg."""
    epoch: int = 30
    """Last of the epoch-N.pt files to average."""
    iter: int = 0
    """If above 0: last of the checkpoint-N.pt files to average, instead of --epoch."""
    avg: int = 15
    """Number of checkpoints to average."""
    use_averaged_model: bool = True
    """Average all batches between two checkpoints, by their running averages; False: the checkpoints themselves."""
    exp_dir: Path = Path("zipformer/exp")
    """Folder of the checkpoints; results go to a folder in it named after the decoding method."""
    decoding_method: str = GREEDY_SEARCH
    """ctc-greedy-search: the best symbol of each frame, repeats merged, blanks dropped; ctc-prefix-beam-search: the
    best phone strings by the sum over their alignments, if wished with a language model; ctc-decoding, nbest: the best
    path through a k2 lattice, or the best strings among random paths of it."""
    beam: int = 16
    """Beam search: hypotheses kept per utterance, 4 to 64."""
    nbest: int = 1
    """Beam search and nbest: hypotheses per utterance in the JSON lines, with their scores; at most --beam."""
    num_paths: int = 100
    """nbest: random paths drawn from each lattice."""
    nbest_scale: float = 1.0
    """nbest: factor of the log-probabilities while drawing; below 1 for more different paths."""
    lm: Path | None = None
    """Beam search: n-gram phone language model, an ARPA file (.gz too), e.g. of local/train_phone_lm.py."""
    lm_weight: float = 0.3
    """Beam search: weight of the language model's log-probability; tune_search.py finds it on dev data."""
    insertion_bonus: float = 0.0
    """Beam search: bonus for each phone in nats, against the deletions that a language model brings; try 0.6."""
    top_tokens: int = 0
    """Beam search: only so many symbols of each frame, the most probable ones, may begin in it; 0 is all."""
    blank_skip: float = 0.0
    """Beam search: take runs of frames whose blank is at least this probable as one blank, e.g. 0.99; 0 is off."""
    inventory: Path | None = None
    """Text file of phones, with white space between them: nothing else can come out."""
    blank_penalty: float = 0.0
    """Taken off the blank's log-probability, in nats; above 0 for fewer deletions."""
    published_padding: bool = False
    """Let padding leak into the last frames of the shorter utterances of a batch, as the published system does; False:
    each utterance gets what it gets alone."""
    test_sets: tuple[str, ...] = ()
    """Comma list of sets of --data-config, by name or "dev" or "test" for all of a kind, or folders; default: test."""
    output_formats: tuple[str, ...] = ("jsonl",)
    """Comma list of jsonl (always written), ctm, textgrid and srt: files with the phones in time."""
    time_correction: Path | None = None
    """JSON file with the correction of the times that time_errors.py fitted; without it the built-in one."""
    device: str = "auto"
    """auto (GPU if there is one), cpu or cuda."""
    precision: str = "fp32"
    """fp32; for speed on a GPU bf16, or fp16, whose results differ by rounding; auto is bf16 on a GPU, else fp32."""
    num_threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""


def decoding_precision(wanted: str, device_type: str) -> str:
    """What a precision of `DecodeConfig` is on a device type ("cpu" or "cuda"): "fp32", "bf16" or "fp16"."""
    if wanted != "auto":
        return wanted
    return "bf16" if device_type == "cuda" else "fp32"


@dataclass(frozen=True)
class Config:
    """All that a training run depends on; stored in its checkpoints."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def clip_norm(self) -> float:
        """Largest gradient 2-norm; 0 means no clipping besides the optimizer's own."""
        if self.train.clip_grad_norm is not None:
            return self.train.clip_grad_norm
        return MIXED_CLIP_NORM if self.model.use_unsup_cr_ctc else 0.0


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested data (``{"model": {...}, "data": {...}, "train": {...}}``) for JSON and checkpoints."""
    return to_plain(config)


def config_from_dict(data: Mapping[str, Any]) -> Config:
    """The Config that ``config_to_dict`` wrote.

    A field that is missing was added since; its default is what was done before. Raises ConfigError that names every
    unknown or malformed field. A published checkpoint holds its flags
    flat and without a section: use ``model_from_published`` there.
    """
    sections: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    problems: list[str] = []
    if set(data) != set(sections) or not all(isinstance(section, Mapping) for section in data.values()):
        found = ", ".join(sorted(map(str, data))) or "nothing"
        raise ConfigError([f"expected the sections {', '.join(sections)}, found {found}; is this config of ours?"])
    parts = {name: from_plain(cls, data[name], name, problems) for name, cls in sections.items()}
    raise_if_any(problems)
    return Config(**parts)


def model_from_published(params: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from the flat flags in a published training checkpoint (lists are texts such as "2,2,3,4,3,2").

    Keys that are no model fields are ignored, absent ones take the published values. Raises ConfigError for a value
    that cannot be read.
    """
    values, problems = {}, []
    for name, kind in field_kinds(ModelConfig).items():
        if name in params:
            try:
                values[name] = coerce(params[name], kind)
            except ValueError as error:
                problems.append(f"{flag_name(name)} {params[name]!r} in the checkpoint: {error}.")
    raise_if_any(problems)
    return ModelConfig(**values)
