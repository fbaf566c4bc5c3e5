"""From batches to losses: targets, views, CR-CTC, and a model that learns a batch by heart."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from small_models import (
    SMALL_MODEL,
    assert_rate,
    draw_parameters,
    make_batch,
    numbers,
    random_batch,
    small_model,
    small_run,
)
from zipformer_crctc import objective
from zipformer_crctc.config import Config
from zipformer_crctc.features import LOG_EPS
from zipformer_crctc.loader import Batch
from zipformer_crctc.losses import consistency_loss, ctc_loss
from zipformer_crctc.metrics import score
from zipformer_crctc.model import CtcModel
from zipformer_crctc.objective import SUM_NAMES, Loss, Objective, TargetEncoder
from zipformer_crctc.optim import ScaledAdam
from zipformer_crctc.schedule import set_batch_count
from zipformer_crctc.search import greedy_search
from zipformer_crctc.tokenizer import PhoneTokenizer

FLOAT32 = torch.autocast("cpu", enabled=False)


def digits(text: str) -> list[int]:
    return [int(digit) for digit in text]


def values(loss: Loss) -> dict[str, float]:
    return dict(zip(SUM_NAMES, loss.sums.tolist(), strict=True))


def plain_run(**data: object) -> Config:
    """Without CR-CTC."""
    run = small_run()
    return replace(run, model=SMALL_MODEL.with_values({"use_cr_ctc": False}), data=replace(run.data, **data))  # type: ignore[arg-type]


@pytest.fixture
def no_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_masks(features: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return features, torch.zeros(features.shape[:2], dtype=torch.bool)

    monkeypatch.setattr(objective, "time_warp", lambda features, *_: features)
    monkeypatch.setattr(objective, "spec_augment", no_masks)


class Listener(nn.Module):
    """Stands for a model: keeps its input, returns given log-probabilities or uniform ones."""

    def __init__(self, log_probs: Tensor | None = None) -> None:
        super().__init__()
        self.log_probs = log_probs
        self.features: list[Tensor] = []
        self.num_frames: list[Tensor] = []

    def forward(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        self.features.append(features)
        self.num_frames.append(num_frames)
        log_probs = self.log_probs
        if log_probs is None:
            log_probs = torch.zeros(len(features), (features.shape[1] - 7) // 2, 11).log_softmax(-1)
        return log_probs, (num_frames - 7) // 2


# Targets


def test_targets_are_normalised_and_cleaned() -> None:
    tokenizer = PhoneTokenizer.from_table()
    encode = TargetEncoder(tokenizer)
    assert encode.text("t͡ʃã ˈɡo") == "tʃa\u0303go"  # tie bar, precomposed vowel, stress, IPA g, space
    assert encode("ˈtʰa") == tokenizer.encode("tʰa")
    assert encode("tʰa")[0] == tokenizer.boundary_id
    assert tokenizer.phones(encode("pa ta")) == ["p", "a", "t", "a"]
    assert encode.unknown.report() == ""


def test_targets_without_diacritics() -> None:
    tokenizer = PhoneTokenizer.from_table()
    with_them, without = TargetEncoder(tokenizer), TargetEncoder(tokenizer, without_diacritics=True)
    assert tokenizer.phones(with_them("tʰãː")) == ["t", "ʰ", "a", "\u0303", "ː"]
    assert tokenizer.phones(without("tʰãː")) == ["t", "a"]


def test_unknown_symbols_are_counted() -> None:
    tokenizer = PhoneTokenizer.from_table()
    encode = TargetEncoder(tokenizer)
    assert tokenizer.unk_id in encode("pЖa")
    encode("pa")
    assert encode.unknown.unknown == {"Ж": 1}
    assert "1 of 2 texts" in encode.unknown.report()


# The CR-CTC loss


@pytest.mark.usefixtures("no_augmentation")
def test_check_values() -> None:
    """The same numbers as for the losses alone, through the whole step with its factor of a half and its weight."""
    log_probs = (3 * numbers((4, 12, 6), 3)).log_softmax(-1)
    batch = random_batch([31, 25], ["355", "34"])
    loss = Objective(small_run(), digits).train_loss(Listener(log_probs), batch, FLOAT32)
    assert loss.total.item() == pytest.approx(32.431148 + 0.15 * 32.250592, rel=1e-7)
    got = values(loss)
    assert got["loss"] == pytest.approx(loss.total.item())
    assert got["ctc_loss"] == pytest.approx(32.431148, rel=1e-7)
    assert got["cr_loss"] == pytest.approx(32.250592, rel=1e-7)
    assert (got["frames"], got["utterances"]) == (21.0, 2.0)  # of one view
    assert got["seconds"] == pytest.approx(0.56)


@pytest.mark.usefixtures("no_augmentation")
@pytest.mark.parametrize("scale", [0.0, 0.15, 1.0])
def test_loss_of_a_model_is_its_formula(scale: float) -> None:
    model = draw_parameters(small_model(), 0.2).train()
    set_batch_count(model, 0.0)
    outputs: list[tuple[Tensor, Tensor]] = []
    model.register_forward_hook(lambda *args: outputs.append(args[2]))
    batch = random_batch([80, 61], ["34567", "3456"])
    loss = Objective(small_run(cr_loss_scale=scale), digits).train_loss(model, batch, FLOAT32)
    ((log_probs, lengths),) = outputs
    assert lengths.tolist() == [36, 27, 36, 27]
    ctc = ctc_loss(log_probs, lengths, torch.tensor([3, 4, 5, 6, 7, 3, 4, 5, 6] * 2), torch.tensor([5, 4, 5, 4])) / 2
    consistency = torch.zeros(())
    for row in range(4):
        this, other = (log_probs[r, : lengths[row]] for r in (row, (row + 2) % 4))
        consistency = consistency + (other.exp() * (other - this)).sum() / 2
    assert consistency.item() > 1.0  # dropout alone makes the views differ
    assert loss.total.item() == pytest.approx((ctc + scale * consistency).item(), rel=1e-5)


@pytest.mark.usefixtures("no_augmentation")
def test_masked_frames_may_weigh_more(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.zeros(4, 31, dtype=torch.bool)
    mask[0, 4], mask[3, 20:] = True, True
    monkeypatch.setattr(objective, "spec_augment", lambda features, *_: (features, mask))
    log_probs = (3 * numbers((4, 12, 6), 3)).log_softmax(-1)
    batch, lengths = random_batch([31, 25], ["355", "34"]), torch.tensor([12, 9, 12, 9])
    loss = Objective(small_run(cr_loss_masked_scale=2.0), digits).train_loss(Listener(log_probs), batch, FLOAT32)
    want = consistency_loss(log_probs, lengths, objective.downsample_time_mask(mask), 2.0).item() / 2
    assert want > 32.3
    assert values(loss)["cr_loss"] == pytest.approx(want)


def test_views_are_warped_alike_and_masked_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch([300] * 6, ["345"] * 6)
    torch.manual_seed(0)
    model = Listener()
    run = Objective(small_run(), digits)
    run.train_loss(model, batch, FLOAT32)
    first, second = model.features[0].chunk(2)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(model.num_frames[0], batch.num_frames.repeat(2))

    monkeypatch.setattr(objective, "spec_augment", lambda features, *_: (features, None))
    run.train_loss(model, batch, FLOAT32)
    first, second = model.features[1].chunk(2)
    assert torch.equal(first, second)
    warped = [not torch.equal(a, b) for a, b in zip(first, batch.features, strict=True)]
    assert sum(warped) >= 4  # each with probability 0.9


def test_rates_in_the_step() -> None:
    """Each view is masked with probability 0.9, by itself; twelve frames are too few to be warped."""
    rows = 1500
    batch = random_batch([12] * rows, ["3"] * rows)
    torch.manual_seed(0)
    model = Listener()
    Objective(small_run(), digits).train_loss(model, batch, FLOAT32)
    as_it_was = (model.features[0] == batch.features.repeat(2, 1, 1)).flatten(1).all(dim=1)
    nothing_masked = 1 / 3 / 27**2  # all of the widths drawn are zero
    unchanged = 0.1 + 0.9 * nothing_masked
    assert_rate(int(as_it_was.sum()), 2 * rows, unchanged)
    first, second = as_it_was.chunk(2)
    assert_rate(int((first & second).sum()), rows, unchanged**2)


def test_the_amount_of_time_masking_is_an_option() -> None:
    batch = random_batch([400] * 20, ["3"] * 20)
    shares = []
    for ratio in (0.0, 1.0, 4.0):
        torch.manual_seed(0)
        model = Listener()
        Objective(small_run(time_mask_ratio=ratio), digits).train_loss(model, batch, FLOAT32)
        (features,) = model.features
        flat = (features == features[:, :, :1]).all(dim=2)  # a masked frame holds one value
        shares.append(flat.float().mean().item())
    assert shares[0] == 0.0
    assert 0.02 < shares[1] < shares[2] < 0.5


# Plain CTC


@pytest.mark.parametrize("augmented", [False, True])
def test_plain_ctc(augmented: bool) -> None:
    batch = random_batch([300, 280], ["34567", "3456"])
    torch.manual_seed(0)
    model = Listener()
    loss = Objective(plain_run(enable_spec_aug=augmented), digits).train_loss(model, batch, FLOAT32)
    assert model.features[0].shape == (2, 304, 80)
    assert torch.equal(model.features[0][:, :300], batch.features) is not augmented
    assert augmented or (model.features[0][:, 300:] == LOG_EPS).all()
    log_probs, lengths = Listener()(batch.features, batch.num_frames)
    want = ctc_loss(log_probs, lengths, torch.tensor([3, 4, 5, 6, 7, 3, 4, 5, 6]), torch.tensor([5, 4]))
    assert loss.total.item() == pytest.approx(want.item())  # a sum, without the half
    assert values(loss)["cr_loss"] == 0.0


def test_validation_is_plain_ctc_in_evaluation_mode() -> None:
    model = draw_parameters(small_model(), 0.2).eval()
    batch = random_batch([80, 61], ["34567", "3456"])
    run = Objective(small_run(), digits)
    loss = run.valid_loss(model, batch)
    log_probs, lengths = model(batch.features, batch.num_frames)
    want = ctc_loss(log_probs, lengths, torch.tensor([3, 4, 5, 6, 7, 3, 4, 5, 6]), torch.tensor([5, 4])).item()
    assert values(loss) == pytest.approx(
        {"loss": want, "ctc_loss": want, "cr_loss": 0.0, "frames": 63.0, "utterances": 2.0, "seconds": 1.41}, rel=1e-6
    )
    assert not loss.total.requires_grad
    assert torch.equal(run.valid_loss(model, batch).sums, loss.sums)


# Odd batches


@pytest.mark.parametrize("config", [small_run(), plain_run()], ids=["CR-CTC", "plain"])
def test_an_empty_batch_gives_a_zero_loss_that_reaches_the_parameters(config: Config) -> None:
    """So that a rank without data takes part in the exchange of gradients."""
    model = small_model().train()
    set_batch_count(model, 5000.0)
    batch = Batch(torch.full((0, 0, 80), LOG_EPS), torch.zeros(0, dtype=torch.int64), [])
    loss = Objective(config, digits).train_loss(model, batch, FLOAT32)
    assert loss.total.item() == 0.0
    assert not loss.sums.any()
    loss.total.backward()
    for name, p in model.named_parameters():
        if name.endswith("layers.0.bypass_scale"):
            continue
        assert p.grad is not None and not p.grad.any(), name


def test_an_impossible_target_does_not_spoil_a_batch() -> None:
    model = draw_parameters(small_model(), 0.2).train()
    batch = random_batch([80, 15], ["34567", "34567"])  # five tokens for four frames
    loss = Objective(small_run(), digits).train_loss(model, batch, FLOAT32)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# Training


def seeded_losses(model: Callable[[], CtcModel], seed: int, steps: int = 3) -> list[float]:
    """Losses of some real steps: all that is random is drawn."""
    random.seed(seed)
    torch.manual_seed(seed)
    net = model().train()
    optimizer = ScaledAdam([{"named_params": list(net.named_parameters())}], lr=0.045, clipping_scale=2.0)
    run = Objective(small_run(), digits)
    losses = []
    for step in range(steps):
        set_batch_count(net, 1000.0 * step)
        loss = run.train_loss(net, random_batch([200, 180], ["3456", "345"]), FLOAT32)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.total.item())
    return losses


def test_same_seed_same_losses() -> None:
    first = seeded_losses(small_model, 1)
    assert first == seeded_losses(small_model, 1)  # to the bit
    assert first != seeded_losses(small_model, 2)


def made_up_speech(encode: TargetEncoder, texts: list[str], frames_per_token: int = 12) -> Batch:
    """Every token has a spectrum of its own, and lasts as long as any other."""
    generator = torch.Generator().manual_seed(0)
    spectra = 2 * torch.randn(encode.tokenizer.vocab_size, 80, generator=generator) - 6
    rows = [spectra[encode(text)].repeat_interleave(frames_per_token, dim=0) for text in texts]
    features = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    features = features + 0.5 * torch.randn(features.shape, generator=generator)
    return make_batch(features, [len(row) for row in rows], texts)


def test_overfitting_one_batch() -> None:
    """CR-CTC with all of its augmentation, dropouts and regularisers, as at the end of their schedules."""
    random.seed(0)
    torch.manual_seed(0)
    texts = ["pataki sumo", "ʃɛlɡo tu", "mi ʒɑna", "tʰoːki"]
    tokenizer = PhoneTokenizer.from_table()
    encode = TargetEncoder(tokenizer)
    batch = made_up_speech(encode, texts)
    model = small_model(
        tokenizer.vocab_size, downsampling_factor=(1, 2, 4), encoder_dim=(24, 32, 40), cnn_module_kernel=(7, 7, 5)
    )
    set_batch_count(model, 20000.0)
    optimizer = ScaledAdam([{"named_params": list(model.named_parameters())}], lr=0.045, clipping_scale=2.0)
    run = Objective(small_run(), encode)
    references = [tokenizer.phones(encode(text)) for text in texts]
    before, per = run.valid_loss(model.eval(), batch).total.item(), 1.0
    for _ in range(30):
        model.train()
        for _ in range(20):
            run.train_loss(model, batch, FLOAT32).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found = greedy_search(*model.eval()(batch.features, batch.num_frames))
        per = score(zip(references, (tokenizer.phones(h.tokens) for h in found), strict=True)).per
        if per == 0.0:
            break
    assert per == 0.0
    assert run.valid_loss(model, batch).total.item() < 0.05 * before
