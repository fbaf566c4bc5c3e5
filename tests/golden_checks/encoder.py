"""Fixtures of the encoder's modules, the losses, the regularisers and the schedules."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from golden_checks.compare import (
    Checker,
    Comparison,
    Fixture,
    advised_tolerances,
    compare,
    compare_abs,
    exact,
)
from zipformer_crctc import (
    activations,
    attention,
    encoder,
    frontend,
    layers,
    losses,
    model,
    norms,
    regularisers,
    schedule,
)

Run = Callable[[nn.Module, dict[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]


def check_module(path: Path, build: Callable[[Mapping[str, Any]], nn.Module], run: Run) -> list[Comparison]:
    """Outputs and gradients of a module in evaluation mode, with the regularisers forced on where the fixture says."""
    fixture = Fixture.read(path)
    out_rel, grad_rel = advised_tolerances(path, 1e-5, 1e-4)
    module = build(fixture.args)
    module.load_state_dict(fixture.group("param."))
    module.eval()
    results = []
    for call, settings in fixture.calls.items():
        cotangents = fixture.group(f"in.{call}.cot.")
        inputs = {key: x for key, x in fixture.group(f"in.{call}.").items() if not key.startswith("cot.")}
        leaves = {key: x.requires_grad_() for key, x in inputs.items() if x.is_floating_point()}
        module.zero_grad()
        with regularisers_on(module, fixture.config.get("regularisers_batch_count")):
            outputs = run(module, inputs, settings)
            for key, want in fixture.group(f"out.{call}.").items():
                results.append(compare(f"{call}.{key}", outputs[key], want, out_rel))
            if cotangents:
                keys = list(cotangents)
                torch.autograd.backward([outputs[key] for key in keys], [cotangents[key] for key in keys])
        gradients = {f"in.{key}": x.grad for key, x in leaves.items()}
        gradients |= {f"param.{key}": p.grad for key, p in module.named_parameters()}
        results += compare_gradients(call, gradients, fixture.group(f"grad.{call}."), grad_rel)
    return results


def compare_gradients(
    call: str, got: Mapping[str, Tensor | None], want: Mapping[str, Tensor], rel: float
) -> list[Comparison]:
    """Gradients against the fixture's; one that it lacks must be absent or zero."""
    largest = max((g.abs().max().item() for g in want.values() if g.numel()), default=0.0)
    results = []
    for name, gradient in got.items():
        if name in want:
            gradient = torch.zeros_like(want[name]) if gradient is None else gradient
            results.append(compare(f"{call}.grad.{name}", gradient, want[name], rel, floor=largest / 1000))
        elif want and gradient is not None and name.startswith("param."):
            results.append(exact(f"{call}.grad.{name} is zero", bool(gradient.any()), False))
    missing = sorted(set(want) - set(got))
    return [*results, exact(f"{call}.gradients without a parameter", missing, [])]


@contextlib.contextmanager
def regularisers_on(module: nn.Module, batch_count: float | None) -> Iterator[None]:
    """Let every Balancer and Whiten act at each call, as at this batch count; nothing else is in training mode."""
    if batch_count is None:
        yield
        return
    for part in module.modules():
        if isinstance(part, regularisers.Balancer | regularisers.Whiten):
            part.train()
            part.batch_count = batch_count
            part.prob = 1.0
    yield
    module.eval()


def run_simple(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"y": module(**inputs)}


def layer_sizes(args: Mapping[str, Any]) -> layers.LayerSizes:
    return layers.LayerSizes(**{name: args[name] for name in layers.LayerSizes.__dataclass_fields__})


def check_swoosh(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    rel, _ = advised_tolerances(path, 5e-6, 5e-6)
    results = []
    for call in fixture.calls:
        for name, function in {"swoosh_l": activations.swoosh_l, "swoosh_r": activations.swoosh_r}.items():
            x = fixture.tensors[f"in.{call}.x"].requires_grad_()
            y = function(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
            results.append(compare(f"{call}.{name}", y, fixture.tensors[f"out.{call}.{name}"], rel))
            results.append(compare(f"{call}.{name}_deriv", slope, fixture.tensors[f"out.{call}.{name}_deriv"], rel))
    return results


def check_bias_norm(path: Path) -> list[Comparison]:
    return check_module(path, lambda a: norms.BiasNorm(a["num_channels"], a["channel_dim"]), run_simple)


def check_positions(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    module = attention.RelativePositions(fixture.args["embed_dim"]).eval()
    return [
        compare_abs(
            call,
            module(torch.zeros(settings["T"], 1, 1), settings.get("left_context_len", 0)),
            fixture.tensors[f"out.{call}.pos_emb"],
            5e-5,
        )
        for call, settings in fixture.calls.items()
    ]


def check_sampling(path: Path) -> list[Comparison]:
    def run(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        if "upsample" in settings:
            return {"y": norms.upsample(inputs["x"], settings["upsample"])}
        return {"y": module(inputs["x"])}

    def build(args: Mapping[str, Any]) -> nn.Module:
        return encoder.Downsample(args["downsample"]) if "downsample" in args else nn.Identity()

    return check_module(path, build, run)


def check_conv_module(path: Path) -> list[Comparison]:
    def run(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"], inputs.get("src_key_padding_mask"), settings.get("chunk_size", -1))}

    return check_module(path, lambda a: layers.ConvModule(a["channels"], a["kernel_size"], a["causal"]), run)


def check_feed_forward(path: Path) -> list[Comparison]:
    return check_module(path, lambda a: layers.FeedForward(a["embed_dim"], a["feedforward_dim"]), run_simple)


def check_nonlin_attention(path: Path) -> list[Comparison]:
    return check_module(path, lambda a: attention.NonlinAttention(a["channels"], a["hidden_channels"]), run_simple)


def check_attention_weights(path: Path) -> list[Comparison]:
    def run(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"attn_weights": module(**inputs)}

    return check_module(path, lambda a: attention.AttentionWeights(**a), run)


def check_self_attention(path: Path) -> list[Comparison]:
    return check_module(path, lambda a: attention.SelfAttention(**a), run_simple)


def check_bypass(path: Path) -> list[Comparison]:
    def run(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"y": module(inputs["src_orig"], inputs["src"])}

    return check_module(path, lambda a: layers.Bypass(a["embed_dim"]), run)


def check_layer(path: Path) -> list[Comparison]:
    def run(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        masks = inputs.get("attn_mask"), inputs.get("src_key_padding_mask")
        return {"y": module(inputs["x"], inputs["pos_emb"], settings.get("chunk", -1), *masks)}

    return check_module(path, lambda a: layers.EncoderLayer(layer_sizes(a), a["causal"]), run)


def check_stack(path: Path) -> list[Comparison]:
    def build(args: Mapping[str, Any]) -> nn.Module:
        sizes = layer_sizes(args)
        stack = encoder.Stack(
            [layers.EncoderLayer(sizes, args["causal"]) for _ in range(args["num_layers"])], sizes.pos_dim
        )
        factor = args.get("downsample", 1)
        return stack if factor == 1 else encoder.DownsampledStack(stack, sizes.embed_dim, factor)

    def run(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        chunk = settings.get("chunk_size", settings.get("chunk", -1))
        return {"y": module(inputs["x"], chunk, None, inputs.get("attn_mask"), inputs.get("src_key_padding_mask"))}

    return check_module(path, build, run)


def check_convnext(path: Path) -> list[Comparison]:
    def build(args: Mapping[str, Any]) -> nn.Module:
        channels = args["channels"]
        return frontend.ConvNeXt(channels, args.get("hidden_channels", args.get("hidden_ratio", 3) * channels))

    return check_module(path, build, run_simple)


def check_frontend(path: Path) -> list[Comparison]:
    def run(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        y, lengths = module(inputs["x"], inputs["x_lens"])
        return {"y": y, "y_lens": lengths}

    return check_module(path, lambda a: frontend.Conv2dSubsampling(a["in_channels"], a["out_channels"]), run)


def build_encoder(args: Mapping[str, Any]) -> encoder.Zipformer:
    per_stack = ("num_heads", "query_head_dim", "pos_head_dim", "value_head_dim", "feedforward_dim")
    sizes = [
        layers.LayerSizes(
            embed_dim=dim,
            pos_dim=args["pos_dim"],
            cnn_module_kernel=args["cnn_module_kernel"][i],
            **{name: args[name][i] for name in per_stack},
        )
        for i, dim in enumerate(args["encoder_dim"])
    ]
    return encoder.Zipformer(
        args["downsampling_factor"],
        args["num_encoder_layers"],
        sizes,
        args["encoder_unmasked_dim"],
        args["causal"],
        args.get("chunk_size", (-1,)),
        args.get("left_context_frames", (-1,)),
        dropout=schedule.Schedule((0, 0.3), (20000, 0.1)),
        output_downsampling_factor=args.get("output_downsampling_factor", 1),
    )


def build_full(args: Mapping[str, Any]) -> model.CtcModel:
    embed = frontend.Conv2dSubsampling(
        args["feature_dim"], args["encoder_dim"][0], dropout=schedule.Schedule((0, 0.3), (20000, 0.1))
    )
    return model.CtcModel(embed, build_encoder(args), args["vocab_size"])


def check_encoder_only(path: Path) -> list[Comparison]:
    def run(module: nn.Module, inputs: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        y, lengths = module(inputs["x"], inputs["x_lens"], model.padding_mask(inputs["x_lens"], inputs["x"].shape[0]))
        return {"encoder_out": y, "encoder_out_lens": lengths}

    return check_module(path, build_encoder, run)


def check_full_model(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    out_rel, grad_rel = advised_tolerances(path, 2e-5, 2e-3)
    net = build_full(fixture.args)
    net.load_state_dict(fixture.group("param."))
    net.eval()
    results = []
    for call, settings in fixture.calls.items():
        net.encoder.chunk_size = tuple(settings.get("chunk_size", fixture.args["chunk_size"]))
        net.encoder.left_context_frames = tuple(
            settings.get("left_context_frames", fixture.args["left_context_frames"])
        )
        inputs, wanted = fixture.group(f"in.{call}."), fixture.group(f"out.{call}.")
        want_gradients = fixture.group(f"grad.{call}.")
        features = inputs["x"].requires_grad_(bool(want_gradients))
        got = full_model_outputs(net, features, inputs)
        results += [compare(f"{call}.{key}", got[key], want, out_rel) for key, want in wanted.items()]
        if want_gradients:
            net.zero_grad()
            got["ctc_loss"].backward()
            gradients = {f"param.{name}": p.grad for name, p in net.named_parameters()} | {"in.x": features.grad}
            results += compare_gradients(call, gradients, want_gradients, grad_rel)
    return results


def full_model_outputs(net: model.CtcModel, features: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every intermediate result, recorded from one run of the model."""
    got: dict[str, Tensor] = {}

    def keep(name: str, transpose: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            got[name] = tensor.transpose(0, 1) if transpose else tensor

        return hook

    hooks = [net.encoder_embed.register_forward_hook(keep("embed", False))]
    hooks += [net.encoder.register_forward_hook(keep("encoder_out", True))]
    hooks += [s.register_forward_hook(keep(f"stack{i}", True)) for i, s in enumerate(net.encoder.encoders)]
    log_probs, lengths = net(features, inputs["x_lens"])
    for hook in hooks:
        hook.remove()
    got |= {"log_probs": log_probs, "encoder_out_lens": lengths}
    if "targets" in inputs:
        got["ctc_loss"] = losses.ctc_loss(log_probs, lengths, inputs["targets"], inputs["target_lengths"])
    return got


def check_losses(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    out_rel, grad_rel = advised_tolerances(path, 5e-6, 5e-4)
    results = []
    for call, settings in fixture.calls.items():
        inputs, wanted = fixture.group(f"in.{call}."), fixture.group(f"out.{call}.")
        logits = inputs["logits"].requires_grad_()
        log_probs = logits.log_softmax(dim=-1)
        ctc = losses.ctc_loss(log_probs, inputs["lens"], inputs["targets"], inputs["target_lengths"])
        consistency = losses.consistency_loss(
            log_probs, inputs["lens"], inputs.get("time_mask"), settings.get("cr_loss_masked_scale", 1.0)
        )
        total = settings["ctc_loss_scale"] * ctc / 2 + settings["cr_loss_scale"] * consistency / 2
        for name, loss in {"ctc": ctc, "cr": consistency, "total": total}.items():
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            key = f"{name}_loss"
            results.append(compare(f"{call}.{key}", loss, wanted[key], out_rel))
            want = fixture.tensors[f"grad.{call}.{name}.logits"]
            results.append(compare(f"{call}.grad.{name}", gradient, want, grad_rel))
    return results


def check_time_mask(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    return [
        exact(
            call,
            losses.downsample_time_mask(fixture.tensors[f"in.{call}.mask"]),
            fixture.tensors[f"out.{call}.mask"],
        )
        for call in fixture.calls
    ]


def check_chunk_mask(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    results = []
    for call, settings in fixture.calls.items():
        chunk = settings["chunk_size"]
        left = encoder.left_context_chunks(chunk, settings["left_context_frames"])
        want = fixture.group(f"out.{call}.")
        results.append(exact(f"{call}.left chunks", torch.tensor([chunk, left]), want["chunk_size_and_left_chunks"]))
        results.append(
            exact(f"{call}.mask", encoder.chunk_attention_mask(settings["T"], chunk, left), want["mask"].bool())
        )
    return results


def check_balancer(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    out_rel, grad_rel = advised_tolerances(path, 1e-5, 1e-5)
    results = []
    for call, settings in fixture.calls.items():
        args = {name: value for name, value in settings["args"].items() if name not in ("num_channels", "prob")}
        module = regularisers.Balancer(prob=1.0, **args).train()
        limits = torch.tensor(module.limits(), dtype=torch.float64)
        results.append(compare(f"{call}.limits", limits, fixture.tensors[f"out.{call}.limits"], out_rel))
        results.append(_backward(call, module, fixture, grad_rel))
    return results


def check_whiten(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    out_rel, grad_rel = advised_tolerances(path, 1e-5, 1e-5)
    results = []
    for call, settings in fixture.calls.items():
        module = regularisers.Whiten(**settings["args"]).train()
        module.prob = 1.0
        results.append(_backward(call, module, fixture, grad_rel))
        wanted = fixture.group(f"out.{call}.")
        metric, _ = regularisers.whitening_metric(fixture.tensors[f"in.{call}.x"].detach(), module.num_groups)
        results.append(compare(f"{call}.metric", metric, wanted["metric"].reshape(()), out_rel))
        results.append(compare(f"{call}.prob_after", torch.tensor(module.prob), wanted["prob_after"].reshape(()), 1e-6))
    return results


def _backward(call: str, module: Callable[[Tensor], Tensor], fixture: Fixture, rel: float) -> Comparison:
    x = fixture.tensors[f"in.{call}.x"].requires_grad_()
    (gradient,) = torch.autograd.grad(module(x), x, fixture.tensors[f"in.{call}.y_grad"])
    return compare(f"{call}.grad", gradient, fixture.tensors[f"grad.{call}.in.x"], rel)


def check_gradient_tricks(path: Path) -> list[Comparison]:
    fixture = Fixture.read(path)
    out_rel, grad_rel = advised_tolerances(path, 5e-6, 1e-5)
    results = []
    for call, settings in fixture.calls.items():
        module = _gradient_trick(settings)
        y = module(fixture.tensors[f"in.{call}.x"])
        results.append(compare(f"{call}.y", y, fixture.tensors[f"out.{call}.y"], out_rel))
        results.append(_backward(call, module, fixture, grad_rel))
    return results


def _gradient_trick(settings: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    name = settings["fn"]
    if name == "limit_param_value":
        return lambda x: regularisers.limit_parameter(x, settings["min"], settings["max"], prob=1.0)
    if name == "penalize_abs_values_gt":
        return lambda x: regularisers.penalise_large_values(x, settings["limit"], settings["penalty"])
    if name == "scale_grad":
        return regularisers.ScaleGrad(settings["alpha"]).train(settings["train"])
    if name == "softmax":
        return lambda x: x.softmax(dim=settings.get("dim", -1))
    raise ValueError(f"unknown function {name!r} in the fixture")


UNUSED_SCHEDULES = ("straight_through_rate", "downsample.dropout", "downsample_output.dropout", "upsample.dropout")


def check_schedules(path: Path) -> list[Comparison]:
    """Every schedule of the model by its path; the published dropout of a feed-forward module sits in its out_proj."""
    fixture = Fixture.read(path)
    net = build_full(fixture.args)
    ours = {
        name.replace(".dropout.p", ".out_proj.dropout_p") if "feed_forward" in name else name: value
        for name, value in schedule.named_schedules(net)
    }
    counts = fixture.tensors["in.batch_counts"].tolist()
    results, seen = [], set()
    for row, name in enumerate(json.loads(fixture.metadata["names"])):
        if name.endswith(UNUSED_SCHEDULES):
            continue
        seen.add(name)
        if name not in ours:
            results.append(exact(f"{name} exists", False, True))
            continue
        values = torch.tensor([ours[name](b) for b in counts], dtype=torch.float64)
        results.append(compare(name, values, fixture.tensors["out.values"][row], 1e-12))
        default = torch.tensor(ours[name](None), dtype=torch.float64)
        results.append(compare(f"{name} in evaluation", default, fixture.tensors["out.eval_values"][row], 1e-12))
    return [*results, exact("schedules that the fixture lacks", sorted(set(ours) - seen), [])]


CHECKERS: dict[str, Checker] = {
    "01": check_swoosh,
    "02": check_bias_norm,
    "03": check_positions,
    "04": check_sampling,
    "05": check_conv_module,
    "06": check_feed_forward,
    "07": check_nonlin_attention,
    "08": check_attention_weights,
    "09": check_self_attention,
    "10": check_bypass,
    "11": check_layer,
    "12": check_stack,
    "13": check_convnext,
    "14": check_frontend,
    "20": check_full_model,
    "21": check_full_model,
    "22": check_encoder_only,
    "23_conv2d": check_frontend,
    "23_encoder": check_layer,
    "30": check_losses,
    "31": check_time_mask,
    "33": check_chunk_mask,
    "40": check_balancer,
    "41": check_whiten,
    "42": check_gradient_tricks,
    "43": check_schedules,
}
