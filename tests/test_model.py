"""The whole acoustic model: published names, shapes and check values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from small_models import SMALL_MODEL, draw_parameters, numbers, random_batch, small_model
from zipformer_crctc.config import ModelConfig
from zipformer_crctc.features import LOG_EPS
from zipformer_crctc.model import CtcModel, build_model, padding_mask
from zipformer_crctc.presets import PRESETS

SPEC = Path(__file__).resolve().parents[2] / "shared" / "spec"
VOCAB_SIZE = 127


def without_values(config: ModelConfig) -> CtcModel:
    """A model whose parameters have shapes but no memory."""
    with torch.device("meta"):
        return build_model(config, VOCAB_SIZE)


def shapes(model: CtcModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def layer_shapes(config: ModelConfig, i: int) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a layer of stack i."""
    dim, heads, kernel = config.encoder_dim[i], config.num_heads[i], config.cnn_module_kernel[i]
    query, value, pos = config.query_head_dim[i], config.value_head_dim[i], config.pos_head_dim[i]
    want: dict[str, tuple[int, ...]] = {"norm.log_scale": (), "norm.bias": (dim,)}
    want |= {name: (dim,) for name in ("bypass_scale", "bypass.bypass_scale", "bypass_mid.bypass_scale")}
    want["self_attn_weights.linear_pos.weight"] = (heads * pos, config.pos_dim)

    def linear(name: str, outputs: int, inputs: int) -> None:
        want[f"{name}.weight"], want[f"{name}.bias"] = (outputs, inputs), (outputs,)

    linear("self_attn_weights.in_proj", heads * (2 * query + pos), dim)
    hidden = 3 * dim // 4
    linear("nonlin_attention.in_proj", 3 * hidden, dim)
    linear("nonlin_attention.out_proj", dim, hidden)
    for k, quarters in ((1, 3), (2, 4), (3, 5)):
        linear(f"feed_forward{k}.in_proj", quarters * config.feedforward_dim[i] // 4, dim)
        linear(f"feed_forward{k}.out_proj", dim, quarters * config.feedforward_dim[i] // 4)
    for k in (1, 2):
        linear(f"self_attn{k}.in_proj", heads * value, dim)
        linear(f"self_attn{k}.out_proj", dim, heads * value)
        conv = f"conv_module{k}."
        linear(f"{conv}in_proj", 2 * dim, dim)
        linear(f"{conv}out_proj", dim, dim)
        lengths = {"depthwise_conv": kernel}
        if config.causal:
            lengths = {"depthwise_conv.causal_conv": (kernel + 1) // 2, "depthwise_conv.chunkwise_conv": kernel}
            want[f"{conv}depthwise_conv.chunkwise_conv_scale"] = (2, dim, kernel)
        for name, length in lengths.items():
            want[f"{conv}{name}.weight"], want[f"{conv}{name}.bias"] = (dim, 1, length), (dim,)
    return want


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of the whole model."""
    a, b, c = config.frontend_channels
    hidden, first, widest = config.frontend_hidden, config.encoder_dim[0], max(config.encoder_dim)
    weights: dict[str, tuple[int, ...]] = {
        "encoder_embed.conv.0": (a, 1, 3, 3),
        "encoder_embed.conv.4": (b, a, 3, 3),
        "encoder_embed.conv.7": (c, b, 3, 3),
        "encoder_embed.convnext.depthwise_conv": (c, 1, 7, 7),
        "encoder_embed.convnext.pointwise_conv1": (hidden, c, 1, 1),
        "encoder_embed.convnext.pointwise_conv2": (c, hidden, 1, 1),
        "encoder_embed.out": (first, 19 * c),
        "ctc_output.1": (VOCAB_SIZE, widest),
    }
    want = {f"{name}.weight": shape for name, shape in weights.items()}
    want |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    want |= {"encoder_embed.out_norm.log_scale": (), "encoder_embed.out_norm.bias": (first,)}
    want["encoder.downsample_output.bias"] = (config.output_downsampling_factor,)
    for i, (factor, layers) in enumerate(zip(config.downsampling_factor, config.num_encoder_layers, strict=True)):
        stack = f"encoder.encoders.{i}."
        if factor > 1:
            want[f"{stack}downsample.bias"] = (factor,)
            want[f"{stack}out_combiner.bypass_scale"] = (config.encoder_dim[i],)
        for index in range(layers):
            prefix = f"{stack}layers.{index}." if factor == 1 else f"{stack}encoder.layers.{index}."
            want |= {prefix + name: shape for name, shape in layer_shapes(config, i).items()}
    return want


CONFIGS = {
    **{name: preset().model for name, preset in PRESETS.items()},
    "causal": SMALL_MODEL.with_values({"causal": True}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_has_the_published_names_and_shapes(name: str) -> None:
    model = without_values(CONFIGS[name])
    assert shapes(model) == published_shapes(CONFIGS[name])
    assert set(shapes(model)) == {name for name, _ in model.named_parameters()}  # no buffers


@pytest.mark.parametrize(("name", "entries", "values"), [("small", 733, 64_059_253), ("large", 1085, 299_970_501)])
def test_published_sizes(name: str, entries: int, values: int) -> None:
    parameters = without_values(CONFIGS[name]).state_dict()
    assert len(parameters) == entries
    assert sum(tensor.numel() for tensor in parameters.values()) == values


@pytest.mark.parametrize("name", ["small", "large"])
def test_parameters_equal_the_published_list(name: str) -> None:
    path = SPEC / f"model-params-{name}.json"
    if not path.is_file():
        pytest.skip(f"no reference material: {path} is absent")
    want = {key: tuple(shape) for key, shape in json.loads(path.read_text(encoding="utf-8")).items()}
    assert shapes(without_values(CONFIGS[name])) == want


@dataclass(frozen=True)
class CheckValues:
    """Results of the reference implementation for parameters and input made by `numbers`."""

    embedded: list[float]
    embedded_rms: float
    encoded_first: list[float]
    encoded_last: list[float]
    encoded_rms: float
    log_probs_first: list[float]
    log_probs_second: list[float]
    sums: tuple[float, float]
    best: list[int]


CHECK_VALUES = {
    "small": CheckValues(
        embedded=[-0.473788, -0.955085, -0.457581, -0.103501],
        embedded_rms=0.939238,
        encoded_first=[-1.071319, -0.297160, -0.082223, 0.265149],
        encoded_last=[-0.315810, 0.236528, 0.550270, 0.762336],
        encoded_rms=0.681989,
        log_probs_first=[-6.122765, -4.859592, -4.184982, -5.183454],
        log_probs_second=[-6.105538, -4.749210, -4.050422, -5.227161],
        sums=(-41695.7995, -30146.4770),
        best=[51] * 10,
    ),
    "large": CheckValues(
        embedded=[-0.447098, 0.931894, 0.306082, -0.835276],
        embedded_rms=0.920236,
        encoded_first=[-3.493094, 0.877561, -0.361554, -0.222145],
        encoded_last=[0.299132, 0.200142, 0.359800, 0.459404],
        encoded_rms=0.661279,
        log_probs_first=[-5.430590, -4.686370, -3.894182, -5.508439],
        log_probs_second=[-5.261180, -4.613944, -3.984110, -5.539992],
        sums=(-41643.1855, -30093.7441),
        best=[40, 40, 80, 80, 80, 80, 40, 80, 40, 40],
    ),
}


def fill_parameters(model: CtcModel) -> None:
    """Pseudo-random values by rank of the key and place in the tensor, so that no file is needed."""
    period = 65537  # numbers(..., r) repeats after as many values
    for rank, (key, tensor) in enumerate(sorted(model.state_dict().items(), key=lambda item: item[0].encode())):
        values = numbers((period,), rank)
        if tensor.dim() >= 2:
            values = 1.5 * values / math.sqrt(tensor.numel() / tensor.shape[0])
        elif key.endswith("bypass_scale"):
            values = 0.5 + 0.3 * values
        else:
            values = (0.2 if key.endswith("log_scale") else 0.3) * values
        copies = -(-tensor.numel() // period)
        tensor.copy_(values.float().repeat(copies)[: tensor.numel()].view(tensor.shape))


def check_input() -> tuple[Tensor, Tensor]:
    features = torch.stack([-5 + 2 * numbers((137, 80), 1000 + n, torch.float32) for n in range(2)])
    features[1, 101:] = LOG_EPS
    return features, torch.tensor([137, 101])


@pytest.mark.parametrize("name", ["small", "large"])
def test_check_values(name: str) -> None:
    """To 5e-6: half a unit of the six digits and the spread of float32 sums in another order, up to 2e-6."""
    want = CHECK_VALUES[name]
    model = without_values(CONFIGS[name]).to_empty(device="cpu").eval()
    features, num_frames = check_input()
    with torch.inference_mode():
        fill_parameters(model)
        embedded, lengths = model.encoder_embed(features, num_frames)
        encoded, _ = model.encode(features, num_frames)
        log_probs, output_lengths = model(features, num_frames)
    assert lengths.tolist() == output_lengths.tolist() == [65, 47]

    def rms(x: Tensor) -> float:
        return x.double().square().mean().sqrt().item()

    def close(got: Tensor | float, values: list[float] | float) -> bool:
        return (got.tolist() if isinstance(got, Tensor) else got) == pytest.approx(values, abs=5e-6, rel=0)

    assert close(embedded[0, 0, :4], want.embedded)
    assert close(rms(embedded[0]), want.embedded_rms)
    assert close(encoded[0, 0, :4], want.encoded_first)
    assert close(encoded[0, 30, -4:], want.encoded_last)
    assert close(rms(encoded[0]), want.encoded_rms)
    assert close(log_probs[0, 0, :4], want.log_probs_first)
    assert close(log_probs[1, 46, :4], want.log_probs_second)
    sums = log_probs[0].double().sum().item(), log_probs[1, :47].double().sum().item()
    assert sums == pytest.approx(want.sums, rel=1e-6)
    assert log_probs[0, :10].argmax(-1).tolist() == want.best


def test_padding_mask() -> None:
    mask = padding_mask(torch.tensor([4, 0, 2]), 4)
    assert mask.int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_output_is_log_probabilities_in_float32(precision: torch.dtype) -> None:
    model = draw_parameters(small_model(), 0.2).eval()
    batch = random_batch([60, 41], ["", ""])
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        log_probs, lengths = model(batch.features, batch.num_frames)
    assert log_probs.dtype == torch.float32
    assert log_probs.shape == (2, 26, 11)
    assert lengths.tolist() == [26, 17]
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 26))


def test_the_longest_utterance_does_not_depend_on_its_batch() -> None:
    model = draw_parameters(small_model(), 0.2).eval()
    batch = random_batch([60, 41], ["", ""])
    with torch.no_grad():
        both, _ = model(batch.features, batch.num_frames)
        alone, _ = model(batch.features[:1], batch.num_frames[:1])
    assert torch.allclose(both[:1], alone, atol=1e-5)


def gradients(model: CtcModel) -> Mapping[str, Tensor | None]:
    batch = random_batch([60, 41], ["", ""])
    log_probs, _ = model(batch.features, batch.num_frames)
    (log_probs * numbers(log_probs.shape, 7, torch.float32)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("causal", [False, True])
def test_every_parameter_learns_but_the_unused_ones(causal: bool) -> None:
    model = draw_parameters(small_model(causal=causal, chunk_size=(16,), left_context_frames=(64,)), 0.2).train()
    unused = [name for name, gradient in gradients(model).items() if gradient is None]
    assert len(unused) == 6
    assert all(name.endswith("layers.0.bypass_scale") for name in unused)
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        assert torch.isfinite(p.grad).all()
        # The softmax over a single weight is constant.
        assert bool(p.grad.any()) is (name != "encoder.downsample_output.bias"), name


def test_isolate_gives_each_utterance_what_it_gets_alone() -> None:
    model = draw_parameters(small_model(output_downsampling_factor=2), 0.3).eval()
    num_frames = [203, 9, 150, 64, 77]
    batch = random_batch(num_frames, [""] * len(num_frames))
    with torch.inference_mode():
        together, lengths = model(batch.features, batch.num_frames, isolate=True)
        for i, frames in enumerate(num_frames):
            alone, _ = model(batch.features[i : i + 1, :frames], torch.tensor([frames]))
            torch.testing.assert_close(together[i, : int(lengths[i])], alone[0], rtol=0.0, atol=2e-5)
        # As published, padding leaks.
        leaking, _ = model(batch.features, batch.num_frames)
    assert float((leaking[1, : int(lengths[1])] - together[1, : int(lengths[1])]).abs().max()) > 0.01
    with pytest.raises(ValueError, match="isolate: not for causal models"):
        small_model(causal=True)(batch.features, batch.num_frames, isolate=True)
