"""Tests of preparing rows from a source of annotations, on a source of a few lines."""

import json
import logging
import os
import pickle
import re
import time
from pathlib import Path

import datasets
import pytest
from PIL import Image

from epmvg_hf.data import builder
from epmvg_hf.data.annotations import AnnotatedImage
from epmvg_hf.data.builder import GroundingBuilder, open_source
from epmvg_hf.data.files.image_files import ImageRoot
from epmvg_hf.data.readers.source import GroundingSource, digest_files

OUTSIDE = "a.json, a.jpg: the box [30, 9, 50, 19] is not within the 40 x 20 pixels of a.jpg, so no row of that image"
INVERTED = "a.json, b.jpg: the box [9, 9, 5, 9] is empty or inverted, expected xmin < xmax and ymin < ymax."


class Source(GroundingSource):
    """A JSON file of images with lists of `[expression, box]`; `meeting` is a folder where processes meet."""

    name = "tiny"

    def __init__(self, root: Path, split: str = "train", exif_oriented: bool = False, meeting: Path | None = None):
        self.file, self.split, self.images = root / "a.json", split, ImageRoot(root)
        self.columns = {"process": datasets.Value("int64"), "note": datasets.Value("string")}
        self.exif_oriented, self.meeting = exif_oriented, meeting

    def fingerprint(self) -> str:
        return digest_files([self.file])

    def list_images(self) -> tuple[list[tuple[str, list]], list[str]]:
        images = json.loads(self.file.read_text())
        return list(images.items()), ["a.json: expected less."] if "too much" in images else []

    def image_id_of(self, item: tuple[str, list]) -> str:
        return item[0].split(".")[0]

    def name_of(self, item: tuple[str, list]) -> str:
        return item[0]

    def annotate(self, item: tuple[str, list]) -> AnnotatedImage:
        name, rows = item
        if rows == "broken":
            raise ValueError(f"a.json, {name}: broken.")
        if self.meeting is not None:
            meet(self.meeting)
        shared = {"where": f"a.json, {name}", "process": os.getpid(), "note": None}
        return AnnotatedImage(
            name, self.image_id_of(item), None, [{"expression": e, "box": box, **shared} for e, box in rows]
        )


def meet(folder: Path) -> None:
    """Waits for another process to come here as well, so that no process is quick enough to do the work of two."""
    (folder / str(os.getpid())).touch()
    patience = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < patience:
        time.sleep(0.005)


GOOD = {"a.jpg": [["a dog", [1, 2, 3, 4]], ["a cat", None]], "b.jpg": [["it", [0, 0, 40, 20]]], "c.jpg": []}
BAD = {
    "a.jpg": [["a dog", [1, 2, 3, 4]], ["a cat", [30, 9, 50, 19]]],
    "b.jpg": [["it", [9, 9, 5, 9]]],
    "c.jpg": [["me", [0, 0, 5, 5]]],
}


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "data", GOOD)


def write(root: Path, images: dict) -> Path:
    root.mkdir(exist_ok=True)
    (root / "a.json").write_text(json.dumps(images))
    for name in "abc":
        Image.new("RGB", (40, 20)).save(root / f"{name}.jpg")
    return root


def rows(dataset) -> list[tuple]:
    return [(row["image"] and row["image"].size, row["image_id"], row["expression"], row["box"]) for row in dataset]


def ids(root: Path, **options) -> list[str]:
    return [row["image_id"] for row in open_source(Source(root), **options)]


@pytest.fixture
def reports(caplog):
    """The messages that were logged since the last call."""
    caplog.set_level(logging.WARNING, logger="epmvg_hf.data.builder")

    def take() -> list[str]:
        messages = [r.getMessage() for r in caplog.records if r.name == "epmvg_hf.data.builder"]
        caplog.clear()
        return messages

    return take


# Rows


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"num_proc": 2}], ids=str)
def test_rows(root, options):
    dataset = open_source(Source(root), **options)
    assert rows(dataset) == [
        ((40, 20), "a", "a dog", [1, 2, 3, 4]),
        ((40, 20), "a", "a cat", None),
        ((40, 20), "b", "it", [0, 0, 40, 20]),
    ]
    assert str(dataset.split) == "train"
    assert list(dataset.features) == ["image", "image_id", "expression", "box", "process", "note"]


def test_a_missing_box_stays_none(root, tmp_path):
    dataset = open_source(Source(root))
    assert dataset["box"][:] == [[1, 2, 3, 4], None, [0, 0, 40, 20]]
    assert dataset.data.column("box").null_count == 1
    dataset.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved").select([1, 2])["box"][:] == [None, [0, 0, 40, 20]]


def test_two_processes(root, tmp_path):
    write(root, {**GOOD, "c.jpg": [["x", None]]})
    expected = rows(open_source(Source(root)))
    (tmp_path / "meeting").mkdir()
    source = Source(root, meeting=tmp_path / "meeting")
    dataset = open_source(source, num_proc=2, cache_dir=str(tmp_path / "cache"))
    assert rows(dataset) == expected
    processes = set(dataset["process"])
    assert len(processes) == 2 and os.getpid() not in processes


def test_more_processes_than_images(root, tmp_path):
    expected = rows(open_source(Source(root)))
    assert rows(open_source(Source(root), num_proc=8, cache_dir=str(tmp_path / "cache"))) == expected


def test_streaming_goes_image_by_image(root):
    dataset = open_source(Source(root), streaming=True)
    assert dataset.num_shards == 3
    assert [row["image_id"] for row in dataset.shard(num_shards=3, index=1)] == ["b"]
    assert sorted(rows(dataset.shuffle(seed=1)), key=str) == sorted(rows(dataset), key=str)


def test_images_with_an_exif_orientation(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(root / "b.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"b\.jpg has EXIF orientation 6"):
        open_source(Source(root))
    assert rows(open_source(Source(root, exif_oriented=True)))[-1] == ((40, 20), "b", "it", [0, 0, 40, 20])


def test_source_is_sent_to_other_processes(root):
    assert rows(open_source(pickle.loads(pickle.dumps(Source(root))))) == rows(open_source(Source(root)))


def test_digest_of_files(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text("x")
    two.write_text("x")
    digests = [digest_files(files, *more) for files in ([one], [two], [one, two], [two, one]) for more in ((), ("a",))]
    two.write_text("y")
    digests += [digest_files([two]), digest_files([])]
    assert len(set(digests)) == 10 and digest_files([one]) == digests[0]
    assert all(re.fullmatch("[0-9a-f]{32}", digest) for digest in digests)


# What cannot be used


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"num_proc": 2}], ids=str)
def test_first_problem_is_raised(tmp_path, options):
    root = write(tmp_path / "data", BAD)
    with pytest.raises(ValueError, match="^" + re.escape(OUTSIDE)):
        list(open_source(Source(root), **options))
    write(root, {"a.jpg": GOOD["a.jpg"], "b.jpg": BAD["b.jpg"]})  # in the second process
    with pytest.raises(ValueError, match="^" + re.escape(INVERTED)):
        list(open_source(Source(root), **options))


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"num_proc": 2}], ids=str)
def test_problems_are_skipped_and_reported(tmp_path, reports, options):
    root = write(tmp_path / "data", BAD)
    (root / "d.jpg").write_bytes(b"")
    write(root, {**BAD, "d.jpg": [["x", [1, 2, 3, 4]]], "too much": []})
    dataset = open_source(Source(root), "skip", "skip", cache_dir=str(tmp_path / "cache"), **options)
    assert rows(dataset) == [((40, 20), "c", "me", [0, 0, 5, 5])]
    first, missing, outside, inverted, empty = reports()
    assert first == "left out: a.json: expected less."
    assert missing == f"1 of 5 images of the train split are missing in {root}: their 0 rows are left out."
    assert outside.startswith(f"left out: {OUTSIDE}")
    assert inverted == f"left out: {INVERTED}"
    assert empty.startswith(f"left out: a.json, d.jpg: {root}/d.jpg has no readable image header")
    assert not [*tmp_path.rglob("left-out*")]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_many_problems_are_counted(tmp_path, reports, monkeypatch, num_proc):
    monkeypatch.setattr(builder, "MAX_REPORTED", 3)
    root = write(tmp_path / "data", {"a.jpg": [["", None]] * 3, "b.jpg": [["", None]] * 2, "c.jpg": [["x", None]]})
    assert ids(root, errors="skip", num_proc=num_proc) == ["c"]
    assert [message[:22] for message in reports()] == [
        *["left out: a.json, a.jp"] * 3,
        "left out: 2 more, 5 in",
    ]


def test_streaming_reports_once(tmp_path, reports, monkeypatch):
    monkeypatch.setattr(builder, "MAX_REPORTED", 3)
    bad = [[value, None] for value in ("", " ", 1, 2, 3)]
    root = write(tmp_path / "data", {"a.jpg": bad[:2], "b.jpg": [["x", None]], "c.jpg": bad[2:]})
    dataset = open_source(Source(root), errors="skip", streaming=True)
    next(iter(dataset))
    assert len(reports()) == 2  # as soon as they are met
    for _ in range(3):
        assert [row["image_id"] for row in dataset] == ["b"]
    assert reports() == [
        "left out: a.json, c.jpg: the expression is 1, expected words.",
        "left out: more, not reported while streaming",
    ]


def test_several_problems_of_a_file_are_one_error(tmp_path):
    root = write(tmp_path / "data", {**GOOD, "../a.jpg": [], "too much": []})
    with pytest.raises(ValueError, match=r"^a\.json: expected less\. \(1 more such problems\)$"):
        open_source(Source(root))


@pytest.mark.parametrize("missing_images", ["error", "skip", "keep"])
@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_lead_out_of_the_folder(tmp_path, reports, missing_images, streaming):
    root = write(tmp_path / "data", {"../a.jpg": GOOD["b.jpg"], **GOOD})
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg")
    message = f"the image '../a.jpg' is not a path within {root}, expected a relative one."
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        open_source(Source(root), missing_images, streaming=streaming)
    dataset = open_source(Source(root), missing_images, "skip", streaming=streaming)
    assert [row["image_id"] for row in dataset] == ["a", "a", "b"]
    assert reports() == [f"left out: {message}"]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_no_usable_row(tmp_path, reports, num_proc):
    root = write(tmp_path / "data", {"a.jpg": BAD["a.jpg"], "b.jpg": BAD["b.jpg"]})
    for _ in range(2):  # what failed is not in the cache
        with pytest.raises(ValueError, match="no row of the train split of tiny is left, expected at least one"):
            open_source(Source(root), errors="skip", num_proc=num_proc)
        assert len(reports()) == 2


def test_no_usable_image(tmp_path, root):
    for options in ({"streaming": True}, {}):
        with pytest.raises(ValueError, match="no image of the train split of tiny is left, expected at least one"):
            open_source(Source(root), exclude=frozenset("abc"), **options)
    with pytest.raises(ValueError, match="no image of the train split of tiny is left"):
        open_source(Source(write(tmp_path / "none", {})))
    with pytest.raises(ValueError, match="no image of the train split of tiny is left"):
        open_source(Source(write(tmp_path / "out", {"../a.jpg": []})), errors="skip", missing_images="keep")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing_images": "ignore"}, 'missing_images must be "error", "skip" or "keep", not \'ignore\'.'),
        ({"errors": "ignore"}, 'errors must be "raise" or "skip", not \'ignore\'.'),
    ],
)
def test_bad_options(root, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(Source(root), **options)


# Missing images


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_images(root, reports, streaming):
    (root / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError) as error:
        open_source(Source(root), streaming=streaming)
    assert f"1 of 3 images of the train split are missing (looked in {root}; one of them is a.jpg)" in str(error.value)

    assert rows(open_source(Source(root), "skip", streaming=streaming)) == [((40, 20), "b", "it", [0, 0, 40, 20])]
    assert reports() == [f"1 of 3 images of the train split are missing in {root}: their 2 rows are left out."]

    kept = rows(open_source(Source(root), "keep", streaming=streaming))
    assert kept[:2] == [(None, "a", "a dog", [1, 2, 3, 4]), (None, "a", "a cat", None)]
    assert len(kept) == 3 and reports() == []


def test_all_images_missing(root):
    for name in "abc":
        (root / f"{name}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="3 of 3 images of the train split are missing"):
        open_source(Source(root), "skip")
    assert [size for size, *_ in rows(open_source(Source(root), "keep"))] == [None] * 3


def test_broken_annotations_of_missing_images(root, reports):
    write(root, {**GOOD, "d.jpg": "broken", "e.jpg": [["x", None], ["", None]]})
    for errors in ("raise", "skip"):
        assert ids(root, missing_images="skip", errors=errors) == ["a", "a", "b"]
        assert reports() == [f"2 of 5 images of the train split are missing in {root}: their 1 rows are left out."]


# Exclusion


@pytest.mark.parametrize("streaming", [False, True])
def test_excluded_images(root, streaming):
    (root / "a.jpg").unlink()  # excluded ones are not missing either
    assert ids(root, exclude=frozenset({"a", "x"}), streaming=streaming) == ["b"]
    with pytest.raises(FileNotFoundError):
        ids(root, exclude=frozenset({"b"}), streaming=streaming)


# Cache


def test_prepared_rows_are_opened_again(root, monkeypatch):
    expected = rows(open_source(Source(root)))
    monkeypatch.setattr(GroundingBuilder, "_generate_tables", None)
    assert rows(open_source(Source(root))) == rows(open_source(Source(root), num_proc=2)) == expected


def test_changed_files_are_prepared_again(root):
    assert ids(root) == ["a", "a", "b"]
    write(root, {**GOOD, "c.jpg": [["x", None]]})
    assert ids(root) == ["a", "a", "b", "c"]
    write(root, GOOD)
    assert ids(root) == ["a", "a", "b"]


def test_options_do_not_share_a_cache(root):
    write(root, {**GOOD, "c.jpg": [["x", None], ["", None]]})
    (root / "b.jpg").unlink()
    kept, skipped = {"missing_images": "keep", "errors": "skip"}, {"missing_images": "skip", "errors": "skip"}
    for _ in range(2):
        assert ids(root, **kept) == ["a", "a", "b", "c"]
        assert ids(root, **skipped) == ["a", "a", "c"]
        assert ids(root, **kept, exclude=frozenset("a")) == ["b", "c"]
        assert ids(root, **kept, exclude=frozenset("ab")) == ["c"]
        with pytest.raises(ValueError, match="expected words"):
            ids(root, missing_images="keep")
        with pytest.raises(FileNotFoundError):
            ids(root)


def test_splits_do_not_share_a_cache(root):
    for split in ("train", "validation", "testA", "test.b"):
        dataset = open_source(Source(root, split))
        assert str(dataset.split) == split and len(dataset) == 3


def test_sources_of_one_name_do_not_share_a_cache(tmp_path):
    one, two = write(tmp_path / "one", GOOD), write(tmp_path / "two", {"c.jpg": [["x", None]]})
    same = write(tmp_path / "same", GOOD)
    assert ids(one) == ids(same) == ["a", "a", "b"] and ids(two) == ["c"]
    paths = [open_source(Source(root)).data.column("image")[0].as_py()["path"] for root in (one, same)]
    assert paths == [str(one / "a.jpg"), str(same / "a.jpg")]


def test_cache_dir(root, tmp_path):
    dataset = open_source(Source(root), cache_dir=str(tmp_path / "own"))
    assert Path(dataset.cache_files[0]["filename"]).is_relative_to(tmp_path / "own" / "tiny" / "train-error-raise")
