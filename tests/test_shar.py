from __future__ import annotations

import gzip
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import soundfile

from shar_folder import RATE, cut, flac, tone, write_folder, write_shard
from zipformer_crctc import sharindex
from zipformer_crctc.shar import DataError, Skipped, Utterance, find_shards, read_shard


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read_folder(folder: Path, skipped: Skipped | None = None) -> list[Utterance]:
    return [utterance for shard in find_shards(folder) for utterance in read_shard(shard, skipped)]


def audio_of(utterance: Utterance) -> tuple[int, int]:
    """(samples, rate) of the bytes an utterance points to."""
    data = Path(utterance.tar).read_bytes()[utterance.offset : utterance.offset + utterance.size]
    samples, rate = soundfile.read(io.BytesIO(data))
    return len(samples), rate


def index_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.index" / "000000.jsonl.gz"


def test_reads_all_in_order(tmp_path: Path) -> None:
    ids = write_folder(tmp_path / "train", [1.0, 2.0, 1.5, 2.0, 1.0], per_shard=2)
    utterances = read_folder(tmp_path / "train")
    assert [u.id for u in utterances] == ids
    assert [u.duration for u in utterances] == [1.0, 2.0, 1.5, 2.0, 1.0]
    assert all(audio_of(u) == (u.num_samples, RATE) for u in utterances)
    assert {(u.text, u.language, u.speaker) for u in utterances} == {("aba", "xx", "s1")}


def test_the_data_folder_stays_as_it_was(tmp_path: Path) -> None:
    """lhotse takes every file of a folder for a field, so the index must lie elsewhere."""
    write_folder(tmp_path / "train", [1.0])
    before = sorted((tmp_path / "train").iterdir())
    read_folder(tmp_path / "train")
    assert sorted((tmp_path / "train").iterdir()) == before
    assert index_file(tmp_path / "train").is_file()


def test_index_files_of_others_are_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0])
    (tmp_path / "train" / "recording.000000.tar.idx").write_bytes(b"x")
    (tmp_path / "train" / "cuts.000000.jsonl.gz.idx").write_bytes(b"x")
    (tmp_path / "train" / "README.md").write_text("about")
    assert len(find_shards(tmp_path / "train")) == 1


@pytest.mark.parametrize("missing", ["recording.000001.tar", "cuts.000001.jsonl.gz"])
def test_missing_partner(tmp_path: Path, missing: str) -> None:
    write_folder(tmp_path / "train", [1.0] * 4, per_shard=2)
    (tmp_path / "train" / missing).unlink()
    with pytest.raises(DataError, match=rf"train: .*has no {missing}.*again"):
        find_shards(tmp_path / "train")


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder.*prepare"):
        find_shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no shards.*prepare"):
        find_shards(tmp_path)


@pytest.mark.parametrize("name", ["recording.000000.tar", "cuts.000000.jsonl.gz"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "train", [1.0])
    (tmp_path / "train" / name).write_bytes(b"")
    skipped = Skipped()
    assert read_folder(tmp_path / "train", skipped) == []
    assert skipped.examples == {"an empty file instead of a shard": [str(tmp_path / "train" / name)]}


def test_truncated_manifest(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0] * 200, per_shard=200)
    path = tmp_path / "train" / "cuts.000000.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-200])
    skipped = Skipped()
    assert 0 < len(read_folder(tmp_path / "train", skipped)) < 200
    assert "manifest breaks off" in skipped.report()
    assert str(path) in skipped.report()
    with pytest.raises(DataError, match="breaks off"):
        read_folder(tmp_path / "train")


def test_manifest_that_is_no_gzip(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0])
    (tmp_path / "train" / "cuts.000000.jsonl.gz").write_bytes(b"plain text\n")
    skipped = Skipped()
    assert read_folder(tmp_path / "train", skipped) == []
    assert skipped.total == 1


@pytest.mark.parametrize("into_member", [True, False])
def test_truncated_tar(tmp_path: Path, into_member: bool) -> None:
    ids = write_folder(tmp_path / "train", [1.0] * 5)
    tar = tmp_path / "train" / "recording.000000.tar"
    third = read_folder(tmp_path / "train")[2]
    data = tar.read_bytes()
    tar.write_bytes(data[: third.offset + third.size // 2 if into_member else third.offset - 512])
    skipped = Skipped(max_examples=None)
    assert [u.id for u in read_folder(tmp_path / "train", skipped)] == ids[:2]
    assert skipped.examples["audio missing from the tar, which is truncated"] == ids[2:]
    assert skipped.examples["tar breaks off, the audio after it is lost"] == [str(tar)]


def test_damaged_header_in_the_middle(tmp_path: Path) -> None:
    ids = write_folder(tmp_path / "train", [1.0] * 3)
    tar = tmp_path / "train" / "recording.000000.tar"
    second = read_folder(tmp_path / "train")[1]
    data = bytearray(tar.read_bytes())
    data[second.offset - 512 : second.offset] = b"\xff" * 512
    tar.write_bytes(bytes(data))
    skipped = Skipped(max_examples=None)
    assert [u.id for u in read_folder(tmp_path / "train", skipped)] == ids[:1]
    assert skipped.examples["audio missing from the tar, which is truncated"] == ids[1:]


def test_each_kind_of_bad_cut_is_named(tmp_path: Path) -> None:
    audio = flac(tone(1.0))
    cuts = [cut(f"u{i}", RATE) for i in range(9)]
    cuts[1]["recording"]["sampling_rate"] = 8000
    cuts[2]["supervisions"] = []
    cuts[3]["supervisions"] *= 2
    cuts[4]["recording"]["channel_ids"] = [0, 1]
    cuts[5]["type"] = "MixedCut"
    del cuts[6]["duration"]
    del cuts[7]["supervisions"][0]["text"]
    write_shard(tmp_path, 0, cuts, [(f"u{i}.flac", audio) for i in range(9)])
    skipped = Skipped()
    assert [u.id for u in read_folder(tmp_path, skipped)] == ["u0", "u8"]
    assert skipped.counts == dict.fromkeys(
        [
            "sampling rate 8000 instead of 16000",
            "no supervision",
            "more than one supervision",
            "2 channels instead of one",
            "MixedCut instead of MonoCut",
            "damaged line in the manifest",
            "no text",
        ],
        1,
    )
    assert skipped.examples["damaged line in the manifest"] == [f"{tmp_path / 'cuts.000000.jsonl.gz'}:7"]
    with pytest.raises(DataError, match=r"cuts.000000.jsonl.gz: u1: sampling rate 8000"):
        read_folder(tmp_path)
    unlabelled = read_shard(find_shards(tmp_path)[0], Skipped(), need_text=False)
    assert [u.id for u in unlabelled] == ["u0", "u2", "u7", "u8"]


def test_damaged_json(tmp_path: Path) -> None:
    write_folder(tmp_path, [1.0] * 3)
    path = tmp_path / "cuts.000000.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"\n".join([lines[0], b'{"id": ', b"\xff\xfe", b"[]", b"", lines[2]])))
    skipped = Skipped()
    assert [u.id for u in read_folder(tmp_path, skipped)] == ["utt-0000", "utt-0002"]
    assert skipped.counts == {"damaged line in the manifest": 3}


def test_cuts_without_audio_and_missing_members(tmp_path: Path) -> None:
    audio = flac(tone(1.0))
    members = [("a.flac", audio), ("b.nodata", b""), ("d.x.flac", audio)]
    write_shard(tmp_path, 0, [cut(name, RATE) for name in ("a", "b", "c", "d.x")], members)
    skipped = Skipped()
    assert [u.id for u in read_folder(tmp_path, skipped)] == ["a", "d.x"]
    assert skipped.examples == {"stored without audio (.nodata)": ["b"], "audio missing from the tar": ["c"]}


def test_audio_is_matched_by_name(tmp_path: Path) -> None:
    members = [(f"{name}.flac", flac(tone(seconds))) for name, seconds in (("b", 2.0), ("c", 3.0), ("a", 1.0))]
    write_shard(tmp_path, 0, [cut(name, n * RATE) for name, n in (("a", 1), ("b", 2), ("c", 3))], members)
    assert [audio_of(u)[0] for u in read_folder(tmp_path)] == [RATE, 2 * RATE, 3 * RATE]


def test_alignment_on_request(tmp_path: Path) -> None:
    entry = cut("a", RATE, alignment={"phone": [["t", 0.0, 0.1], ["ʃ", 0.1, 0.25, 0.9]]})
    write_shard(tmp_path, 0, [entry], [("a.flac", flac(tone(1.0)))])
    shard = find_shards(tmp_path)[0]
    assert next(read_shard(shard)).alignment is None
    assert next(read_shard(shard, keep_alignment=True)).alignment == (("t", 0.0, 0.1), ("ʃ", 0.1, 0.25))


def test_index_is_read_instead_of_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "train", [1.0] * 3)
    first = read_folder(tmp_path / "train")
    monkeypatch.setattr(sharindex, "_build", lambda *_: pytest.fail("the index was not used"))
    assert read_folder(tmp_path / "train") == first


@pytest.mark.parametrize("damage", ["truncated", "garbage", "wrong content"])
def test_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    write_folder(tmp_path / "train", [1.0] * 3)
    first = read_folder(tmp_path / "train")
    index = index_file(tmp_path / "train")
    good = index.read_bytes()
    text = gzip.decompress(good).decode()
    bad = {
        "truncated": good[:-20],
        "garbage": b"x" * 100,
        "wrong content": gzip.compress(text.rpartition("\n")[0].encode()),
    }
    index.write_bytes(bad[damage])
    assert read_folder(tmp_path / "train") == first
    assert gzip.decompress(index.read_bytes()).decode() == text
    assert [path.name for path in index.parent.iterdir()] == [index.name]


def test_index_of_a_changed_tar_is_made_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0] * 2)
    first = read_folder(tmp_path / "train")
    write_folder(tmp_path / "train", [1.5] * 2)
    second = read_folder(tmp_path / "train")
    assert [u.id for u in first] == [u.id for u in second]
    assert first[1].offset != second[1].offset
    assert audio_of(second[1]) == (24000, RATE)


def test_index_of_a_changed_manifest_is_made_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0] * 2)
    tar = (tmp_path / "train" / "recording.000000.tar").read_bytes()
    read_folder(tmp_path / "train")
    write_shard(tmp_path / "train", 0, [cut("utt-0001", RATE)], [])
    (tmp_path / "train" / "recording.000000.tar").write_bytes(tar)
    assert [u.id for u in read_folder(tmp_path / "train")] == ["utt-0001"]


def test_index_dir_replaces_the_cache(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0] * 2)
    (tmp_path / ".train.index").write_text("not writable")
    (shard,) = find_shards(tmp_path / "train", tmp_path / "indexes")
    assert len(list(read_shard(shard))) == 2
    assert len(list((tmp_path / "indexes").rglob("*.jsonl.gz"))) == 1 and not (tmp_path / "cache").exists()


def test_many_processes_make_an_index_at_once(tmp_path: Path) -> None:
    ids = write_folder(tmp_path / "train", [1.0] * 50, per_shard=50)
    (shard,) = find_shards(tmp_path / "train")
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: [u.id for u in read_shard(shard)], range(16)))
    assert read == [ids] * 16
    assert [path.name for path in index_file(tmp_path / "train").parent.iterdir()] == ["000000.jsonl.gz"]


@pytest.mark.parametrize("name", ["x" * 150, "pʰã", "a/b/" + "y" * 97, "z" * 300])
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_headers_of_all_kinds(tmp_path: Path, name: str, kind: int) -> None:
    path = tmp_path / "recording.000000.tar"
    with tarfile.open(path, "w", format=kind) as archive:
        for member, data in (
            ("plain.flac", b"a" * 700),
            (f"{name}.flac", b"bb"),
            ("last.flac", b"c"),
            ("d.nodata", b""),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    members, complete = sharindex.scan_tar(path)
    assert complete and [stem for stem, _, _ in members] == ["plain", name, "last", "d"]
    content = path.read_bytes()
    assert [content[offset : offset + size] for _, offset, size in members[:3]] == [b"a" * 700, b"bb", b"c"]
    assert members[3][2] == -1


def test_an_id_that_stands_there_twice(tmp_path: Path) -> None:
    audio = [("a.flac", flac(tone(1.0))), ("a.flac", flac(tone(2.0)))]
    write_shard(tmp_path, 0, [cut("a", RATE), cut("a", 2 * RATE)], audio)
    assert [audio_of(u)[0] for u in read_folder(tmp_path)] == [RATE, 2 * RATE]


def test_index_goes_to_the_cache_where_the_data_are_read_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0] * 2)
    (tmp_path / ".train.index").write_text("a file where the folder would be, as even root cannot write into it")
    first = read_folder(tmp_path / "train")
    assert len(list((tmp_path / "cache").rglob("*.jsonl.gz"))) == 1
    assert read_folder(tmp_path / "train") == first


def test_report_counts_names_and_announces(caplog: pytest.LogCaptureFixture) -> None:
    skipped = Skipped(max_examples=2, announce=True)
    assert skipped.report() == ""
    for i in range(4):
        skipped.add("too long", f"u{i}")
    skipped.add("no text", "v")
    assert skipped.report() == "5 skipped: 4 too long (u0, u1, ...); 1 no text (v)"
    assert [record.args[:2] for record in caplog.records if isinstance(record.args, tuple)] == [
        ("u0", "too long"),
        ("v", "no text"),
    ]


def test_equal_to_lhotse(tmp_path: Path) -> None:
    """What lhotse writes is read as lhotse reads it, alignments included; no index disturbs lhotse's reader."""
    lhotse = pytest.importorskip("lhotse", reason="reads a folder that lhotse wrote")
    from lhotse.shar import SharWriter
    from lhotse.supervision import AlignmentItem

    cuts = []
    for i, seconds in enumerate((1.0, 2.5, 1.23456, 3.0, 0.5)):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, tone(seconds, i), RATE, subtype="PCM_16")
        recorded = lhotse.Recording.from_file(path, recording_id=f"rec.{i}").to_cut()
        supervision = lhotse.SupervisionSegment(
            f"sup{i}", f"rec.{i}", 0.0, recorded.duration, 0, "pʰã", language="Xx", speaker=f"s{i}"
        )
        supervision.alignment = {"phone": [AlignmentItem("pʰ", 0.0, 0.1), AlignmentItem("ã", 0.1, 0.2)]}
        recorded.supervisions = [supervision]
        recorded.id = f"cut.{i}"
        cuts.append(recorded)
    folder = tmp_path / "train"
    folder.mkdir()
    with SharWriter(str(folder), fields={"recording": "flac"}, shard_size=2) as writer:
        for recorded in cuts:
            writer.write(recorded)
    ours = [u for shard in find_shards(folder) for u in read_shard(shard, keep_alignment=True)]
    fields = {
        "cuts": sorted(map(str, folder.glob("cuts.*.jsonl.gz"))),
        "recording": sorted(map(str, folder.glob("recording.*.tar"))),
    }
    theirs = list(lhotse.CutSet.from_shar(fields=fields))
    assert len(ours) == len(theirs) == 5
    for mine, other in zip(ours, theirs, strict=True):
        supervision = other.supervisions[0]
        assert (mine.id, mine.duration, mine.num_samples) == (other.id, other.duration, other.num_samples)
        assert (mine.text, mine.language, mine.speaker) == (
            supervision.text,
            supervision.language,
            supervision.speaker,
        )
        assert mine.alignment == tuple((a.symbol, a.start, a.duration) for a in supervision.alignment["phone"])
        assert audio_of(mine) == (other.load_audio().shape[1], RATE)
