"""The sizes of a model, told by the shapes in its state dict: published checkpoints do not carry a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]

PUBLISHED_POS_HEAD_DIM = 4
PUBLISHED_QUERY_VALUE_DIMS = ((32, 12), (64, 48))
"""Query and value channels per head of the published small and large models."""

PUBLISHED_UNMASKED_DIMS: Mapping[tuple[int, ...], tuple[int, ...]] = {
    (192, 256, 384, 512, 384, 256): (192, 192, 256, 256, 256, 192),
    (512, 512, 768, 1024, 768, 512): (192, 192, 256, 320, 256, 192),
}
"""Channels that the feature masks of training leave alone, by the channels of the stacks; no tensor tells them."""


def sizes_from_state_dict(state: State) -> dict[str, Any]:
    """Sizes of a model under the names of the configuration's fields, and ``feature_dim`` and ``vocab_size``.

    Shapes tell only products of the number of heads and the channels per head. The positional channels per head are
    taken to be 4, as in all published models, where that fits; else the published query and value channels decide.
    ``encoder_unmasked_dim`` matters in training only: the published ones for the published channels, else the channels.

    Raises:
        ValueError: a tensor is missing, or no numbers of heads fit, or more than one.
    """
    prefixes = [_layers_prefix(state, stack) for stack in range(_count(state, r"encoder\.encoders\.(\d+)\."))]
    if not prefixes:
        raise ValueError("no tensor encoder.encoders.N...: not the state dict of a Zipformer model")
    first_layers = [f"{prefix}0." for prefix in prefixes]
    causal = f"{first_layers[0]}conv_module1.depthwise_conv.chunkwise_conv.weight" in state
    kernel = "depthwise_conv.chunkwise_conv.weight" if causal else "depthwise_conv.weight"
    encoder_dim = tuple(_shape(state, f"{layer}bypass_scale")[0] for layer in first_layers)
    return {
        "num_encoder_layers": tuple(_count(state, rf"{re.escape(prefix)}(\d+)\.") for prefix in prefixes),
        "downsampling_factor": tuple(_downsampling(state, stack) for stack in range(len(prefixes))),
        "encoder_dim": encoder_dim,
        "encoder_unmasked_dim": PUBLISHED_UNMASKED_DIMS.get(encoder_dim, encoder_dim),
        "feedforward_dim": tuple(_shape(state, f"{layer}feed_forward2.in_proj.weight")[0] for layer in first_layers),
        **_head_sizes(state, first_layers),
        "pos_dim": _shape(state, f"{first_layers[0]}self_attn_weights.linear_pos.weight")[1],
        "cnn_module_kernel": tuple(_shape(state, f"{layer}conv_module1.{kernel}")[2] for layer in first_layers),
        "causal": causal,
        "frontend_channels": tuple(_shape(state, f"encoder_embed.conv.{index}.weight")[0] for index in (0, 4, 7)),
        "output_downsampling_factor": _shape(state, "encoder.downsample_output.bias")[0],
        "frontend_hidden": _shape(state, "encoder_embed.convnext.pointwise_conv1.weight")[0],
        "feature_dim": _feature_dim(state),
        "vocab_size": _shape(state, "ctc_output.1.weight")[0],
    }


def _shape(state: State, name: str) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"no tensor {name}: not the state dict of a Zipformer CTC model")
    return tuple(state[name].shape)


def _count(state: State, pattern: str) -> int:
    """One more than the largest number in the pattern's group among the names."""
    return max((int(match[1]) + 1 for name in state if (match := re.match(pattern, name))), default=0)


def _downsampling(state: State, stack: int) -> int:
    name = f"encoder.encoders.{stack}.downsample.bias"
    return state[name].shape[0] if name in state else 1


def _layers_prefix(state: State, stack: int) -> str:
    """Stacks at the full rate hold their layers themselves, others inside an inner encoder."""
    inner = "encoder." if _downsampling(state, stack) > 1 else ""
    return f"encoder.encoders.{stack}.{inner}layers."


def _feature_dim(state: State) -> int:
    """Mel bins; the front-end halves 80 twice to 19 places, as it would 77 to 79 bins."""
    channels, inputs = _shape(state, "encoder_embed.conv.7.weight")[0], _shape(state, "encoder_embed.out.weight")[1]
    if inputs != channels * 19:
        raise ValueError(
            f"encoder_embed.out.weight takes {inputs} inputs, with {channels} channels that is not the {channels * 19} "
            "of a model for 80 mel bins: only those can be used"
        )
    return 80


def _head_sizes(state: State, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Heads of each stack and the channels per head, the same in all stacks.

    With H heads the shapes are H (2 q + p) for queries, keys and positions, H p for positions, H v for values.
    """
    queries = [_shape(state, f"{layer}self_attn_weights.in_proj.weight")[0] for layer in layers]
    positions = [_shape(state, f"{layer}self_attn_weights.linear_pos.weight")[0] for layer in layers]
    values = [_shape(state, f"{layer}self_attn1.in_proj.weight")[0] for layer in layers]
    fits: dict[int, tuple[int, int]] = {}
    for p in range(1, min(positions) + 1):
        if (dims := _query_value_dims(p, queries, positions, values)) is not None:
            fits[p] = dims
    shapes = f"queries {queries}, positions {positions}, values {values}"
    if not fits:
        raise ValueError(f"no number of heads fits all stacks ({shapes}): give the sizes by flags")
    if PUBLISHED_POS_HEAD_DIM in fits:
        p = PUBLISHED_POS_HEAD_DIM
    else:
        published = [p for p, dims in fits.items() if dims in PUBLISHED_QUERY_VALUE_DIMS]
        if len(published or fits) != 1:
            raise ValueError(
                f"more than one number of heads fits ({shapes}; positional channels per head {sorted(fits)}): "
                "give --num-heads, --query-head-dim, --value-head-dim and --pos-head-dim"
            )
        p = next(iter(published or fits))
    q, v = fits[p]
    return {
        "num_heads": tuple(size // p for size in positions),
        "query_head_dim": (q,) * len(layers),
        "value_head_dim": (v,) * len(layers),
        "pos_head_dim": (p,) * len(layers),
    }


def _query_value_dims(
    p: int, queries: Sequence[int], positions: Sequence[int], values: Sequence[int]
) -> tuple[int, int] | None:
    """Query and value channels per head, if whole and equal in all stacks, for p positional channels per head."""
    found = set()
    for query, position, value in zip(queries, positions, values, strict=True):
        heads, rest = divmod(position, p)
        if rest or not heads or query % heads or value % heads or (query // heads - p) % 2 or query // heads <= p:
            return None
        found.add(((query // heads - p) // 2, value // heads))
    return found.pop() if len(found) == 1 else None
