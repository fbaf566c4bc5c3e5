"""Labelling shards with several models: what is kept, how it is written, and going on after a break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lhotse import CutSet

from shar_folder import cut, flac, tone, write_folder, write_shard
from small_models import draw_parameters, small_model, small_run
from zipformer_crctc import checkpoint, pseudo_label
from zipformer_crctc.config import config_to_dict
from zipformer_crctc.shar import Skipped, find_shards, read_shard


def save_model(path: Path, seed: int, **payload: Any) -> Path:
    """A checkpoint of a random model that says something."""
    model = draw_parameters(small_model(127, seed), 0.3, seed)
    checkpoint.save(path, {"model": model.state_dict(), "config": config_to_dict(small_run()), **payload})
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("models")
    return tuple(save_model(folder / f"{name}.pt", seed) for seed, name in enumerate(("one", "two", "three")))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards: two of tones, one with damaged audio, a cut without supervision, and one with an old text."""
    folder = tmp_path_factory.mktemp("source") / "shar"
    write_folder(folder, [0.6, 0.8, 1.0, 0.7, 0.9, 1.1], per_shard=3)
    names = ["bare", "broken", "old"]
    cuts = [cut(name, 12_000, None if name == "bare" else "old text") for name in names]
    cuts[2]["supervisions"][0] |= {"alignment": {"phone": []}, "custom": {"gloss": "goat"}, "speaker": "s"}
    audio = [(f"{name}.flac", flac(tone(0.75, i)) if name != "broken" else b"fLaC") for i, name in enumerate(names)]
    write_shard(folder, 2, cuts, audio)
    return folder


def flags(source: Path, output: Path, models: tuple[Path, ...], *more: Any) -> list[str]:
    base = ("--source", source, "--output-dir", output, "--checkpoints", ",".join(map(str, models)))
    settings = ("--num-workers", 0, "--max-duration", 3, "--device", "cpu", "--num-threads", 1)
    return [str(part) for part in (*base, *settings, *more)]


def read_labels(folder: Path) -> dict[str, str]:
    return {u.id: u.text for shard in find_shards(folder / "shar") for u in read_shard(shard)}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def scores_of(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted((folder / "scores").iterdir())
    return {item["id"]: item for file in files for item in read_json(file)["utterances"]}


def contents(folder: Path) -> dict[str, bytes]:
    """All results, without logs and without the index that reading makes beside shards."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name not in ("log", ".shar.index"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def everything(source: Path, models: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that keeps all that has a label."""
    output = tmp_path_factory.mktemp("everything") / "out"
    pseudo_label.main(flags(source, output, models, "--keep-percent", 100))
    return output


def test_labels_scores_and_counts(source: Path, everything: Path, models: tuple[Path, ...]) -> None:
    scores = scores_of(everything)
    assert len(scores) == 8 and all(len(item["hypotheses"]) == 3 for item in scores.values())
    assert len({item["pfer"] for item in scores.values()}) > 3
    labels = read_labels(everything)
    assert labels == {name: item["label"] for name, item in scores.items()} and all(labels.values())
    summary = read_json(everything / "summary.json")
    assert (summary["utterances"], summary["kept"], summary["shards"]) == (9, 8, 3)
    assert summary["dropped"] == {"damaged audio": 1}
    assert sum(summary["labels_of"].values()) == 8 and set(summary["labels_of"]) <= set(map(str, models))
    assert summary["pfer"] == summary["kept_pfer"]
    assert summary["pfer"]["p100"] == max(item["pfer"] for item in scores.values()) == summary["selection"]["limit"]


def test_supervisions_of_the_labelled_cuts(source: Path, everything: Path, models: tuple[Path, ...]) -> None:
    fields = {name: sorted(map(str, (everything / "shar").glob(f"{name}.*"))) for name in ("cuts", "recording")}
    cuts = {item.id: item for item in CutSet.from_shar(fields=fields)}
    old = {item.id: item for item in CutSet.from_shar(in_dir=str(source)) if item.id != "broken"}
    assert list(cuts) == list(old)
    for name, item in cuts.items():
        assert (item.load_audio() == old[name].load_audio()).all()
        (supervision,) = item.supervisions
        score = scores_of(everything)[name]
        assert supervision.custom["pseudo_label"] == {
            "pfer": score["pfer"],
            "pfer_per_phone": score["pfer_per_phone"],
            "label_of": str(models[score["label_of"]]),
        }
    supervision = cuts["old"].supervisions[0]
    assert (supervision.speaker, supervision.custom["gloss"], supervision.alignment) == ("s", "goat", None)
    assert cuts["bare"].supervisions[0].duration == cuts["bare"].duration


def test_a_threshold_and_a_percentage(source: Path, everything: Path, models: tuple[Path, ...], tmp_path: Path) -> None:
    ranked = sorted(scores_of(everything).values(), key=lambda item: item["pfer_per_phone"])
    limit = ranked[3]["pfer_per_phone"]
    wanted = {item["id"]: item["label"] for item in ranked[:4]}
    pseudo_label.main(flags(source, tmp_path / "a", models, "--max-pfer", limit, "--per-phone", True))
    pseudo_label.main(flags(source, tmp_path / "b", models, "--keep-percent", 50, "--per-phone", True))
    assert read_labels(tmp_path / "a") == read_labels(tmp_path / "b") == wanted
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    dropped = read_json(tmp_path / "a/summary.json")["dropped"]
    assert dropped == {"the models disagree": 4, "damaged audio": 1}


def test_another_threshold_needs_no_decoding(
    source: Path, models: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pseudo_label.main(flags(source, tmp_path / "out", models, "--keep-percent", 100))
    best = min(scores_of(tmp_path / "out").values(), key=lambda item: item["pfer"])
    monkeypatch.setattr(pseudo_label, "load_labellers", None)
    pseudo_label.main(flags(source, tmp_path / "out", models, "--max-pfer", best["pfer"]))
    assert read_labels(tmp_path / "out") == {best["id"]: best["label"]}
    # Shards of which nothing is left are gone, with their audio.
    assert len(list((tmp_path / "out/shar").iterdir())) == 2


def test_a_run_that_broke_off_goes_on(
    source: Path, everything: Path, models: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(source, tmp_path / "out", models, "--keep-percent", 100)
    score_shard, scored = pseudo_label.score_shard, list[int]()

    def counted(shard: Any, *rest: Any) -> Any:
        if shard.number == 1 and len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(shard.number)
        return score_shard(shard, *rest)

    monkeypatch.setattr(pseudo_label, "score_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label.main(arguments)
    assert not (tmp_path / "out/summary.json").exists()
    scored.append(-1)
    pseudo_label.main(arguments)
    assert scored == [0, -1, 1, 2]
    # A shard whose report is missing is written again, and only it.
    before = contents(tmp_path / "out")
    kept = tmp_path / "out/shar/cuts.000000.jsonl.gz"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "out/reports/000001.json").unlink()
    (tmp_path / "out/shar/recording.000001.tar").unlink()
    pseudo_label.main(arguments)
    assert contents(tmp_path / "out") == before == contents(everything)
    assert kept.stat().st_mtime_ns == stamp


def test_ranks_share_the_shards(
    source: Path,
    everything: Path,
    models: tuple[Path, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = flags(source, tmp_path / "out", models, "--keep-percent", 100, "--wait", 0)
    with pytest.raises(SystemExit):
        pseudo_label.main([*arguments, "--world-size", "2", "--rank", "1"])
    assert "2 shards have no scores yet (0, 2)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out/scores").iterdir()] == ["000001.json"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    pseudo_label.main(arguments)
    assert not (tmp_path / "out/summary.json").exists()
    monkeypatch.setenv("RANK", "1")
    pseudo_label.main(arguments)
    assert contents(tmp_path / "out") == contents(everything)


def test_a_percentage_waits_for_the_other_ranks(
    source: Path, everything: Path, models: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*flags(source, tmp_path / "out", models, "--keep-percent", 100), "--world-size", "2"]
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        pseudo_label.main([*arguments, "--rank", "1"])

    monkeypatch.setattr(pseudo_label.time, "sleep", nap)
    pseudo_label.main([*arguments, "--rank", "0"])
    assert len(naps) == 1
    assert contents(tmp_path / "out") == contents(everything)


def test_checkpoints_of_a_folder_are_averaged(source: Path, models: tuple[Path, ...], tmp_path: Path) -> None:
    for batch, seed in ((2, 5), (4, 6), (6, 7)):
        average = {name: tensor.double() for name, tensor in small_model(127, seed).state_dict().items()}
        payload = {"model_avg": average, "batch_idx_train": batch, "average_period": 2}
        save_model(tmp_path / "run" / f"checkpoint-{batch}.pt", seed, **payload)
    run = str(tmp_path / "run")
    more = ("--avg", 1, "--blank-penalty", 20, "--keep-percent", 50)
    names = ",".join((f"{run}@4", f"{run}@6"))
    pseudo_label.main([*flags(source, tmp_path / "out", models, *more), "--checkpoints", names])
    assert set(read_json(tmp_path / "out/config.json")["models"]) == {f"{run}@4", f"{run}@6"}
    assert 4 <= read_json(tmp_path / "out/summary.json")["kept"] < 8


def test_scores_of_other_settings_are_not_mixed(
    source: Path, everything: Path, models: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(everything)
    for more in (("--blank-penalty", "1"), ("--checkpoints", f"{models[0]},{models[1]}")):
        with pytest.raises(SystemExit):
            pseudo_label.main([*flags(source, everything, models, "--keep-percent", 50), *more])
        assert "made with other settings" in capsys.readouterr().err
    assert contents(everything) == before


def test_what_is_left_must_be_something(
    source: Path, models: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pseudo_label.main(flags(source, tmp_path / "out", models, "--max-pfer", 0))
    assert "no utterance was kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--max-pfer", "1", "--keep-percent", "1"), "either --max-pfer"),
        ((), "either --max-pfer"),
        (("--max-pfer", "-1"), "--max-pfer -1"),
        (("--keep-percent", "0"), "--keep-percent 0"),
        (("--keep-percent", "5", "--checkpoints", "one.pt"), "two or more different ones"),
        (("--keep-percent", "5", "--checkpoints", "no.pt,where.pt"), "no.pt"),
        (("--keep-percent", "5", "--checkpoints", "nowhere@5,two.pt"), "nowhere: no such folder"),
        (("--keep-percent", "5", "--source", "nowhere"), "nowhere: no such folder"),
        (("--keep-percent", "5", "--iter", "5"), "--iter 5"),
        (("--keep-percent", "5", "--test-sets", "dev"), "--test-sets dev"),
        (("--keep-percent", "5", "--remove-diacritics", "True"), "--remove-diacritics True"),
        (("--keep-percent", "5", "--rank", "2", "--world-size", "2"), "--rank 2"),
    ],
)
def test_bad_input_ends_with_one_message(
    source: Path,
    models: tuple[Path, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    words: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        pseudo_label.main([*flags(source, tmp_path / "out", models), *more])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_torchrun_and_flags_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    problems: list[str] = []
    assert pseudo_label.place(pseudo_label.PseudoLabelConfig(), problems) == (1, 4) and not problems
    pseudo_label.place(pseudo_label.PseudoLabelConfig(rank=2), problems)
    assert problems == ["--rank 2: torchrun says 1; leave the flag out."]


def test_a_shard_that_changed_after_it_was_scored(
    models: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "in", [0.6, 0.7])
    arguments = flags(tmp_path / "in", tmp_path / "out", models, "--keep-percent", 100)
    pseudo_label.main(arguments)
    write_folder(tmp_path / "in", [0.6])
    (tmp_path / "out/reports/000000.json").unlink()
    with pytest.raises(SystemExit):
        pseudo_label.main(arguments)
    assert "utt-0001 and 0 more are gone" in capsys.readouterr().err


def test_a_truncated_tar_is_counted(models: tuple[Path, ...], tmp_path: Path) -> None:
    write_folder(tmp_path / "in", [0.6, 0.7])
    tar = tmp_path / "in/recording.000000.tar"
    found = {u.id: u for u in read_shard(find_shards(tmp_path / "in")[0], Skipped())}
    tar.write_bytes(tar.read_bytes()[: found["utt-0001"].offset + 100])
    pseudo_label.main(flags(tmp_path / "in", tmp_path / "out", models, "--keep-percent", 100))
    assert list(read_labels(tmp_path / "out")) == ["utt-0000"]
    dropped = read_json(tmp_path / "out/summary.json")["dropped"]
    assert dropped["audio missing from the tar, which is truncated"] == 1
