"""Tests of the refer API's files, hand-written ones in the bytes of Python 2 and 3, and real ones where they are."""

import copy
import json
import logging
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Value
from PIL import Image

from epmvg_hf import ImageGroups, load_grounding_dataset
from epmvg_hf.data.benchmarks import BENCHMARKS, SplitRequest
from epmvg_hf.data.builder import GroundingBuilder, open_source
from epmvg_hf.data.readers import refer_api
from epmvg_hf.data.readers.refer_api import ReferFiles
from epmvg_hf.data.readers.transvg_index import IndexFile
from epmvg_hf.evaluation.blind_baselines import blind_accuracy
from tests.fixtures.paths import REAL_DATA
from tests.fixtures.refer_files import DATA, GROUPS, TRAIN_2014, write

# (image_id, ref_id, ann_id, sent_id, expression, box in 0-based half-open pixels)
TRAIN = [
    ("42", "5", "1719310", "0", "the lady with the blue shirt", [3.93, 9.99, 38.15, 27.41]),
    ("42", "5", "1719310", "1", "blue shirt", [3.93, 9.99, 38.15, 27.41]),
    ("42", "7", "13", "3", "dog", [0, 1, 2, 4]),
    ("7", "6", "12", "2", "caf\xe9 on the left", [10.5, 0.25, 20, 20]),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "data")


def changed(place: tuple, *value, data: dict = DATA) -> dict:
    """A copy of the data with one entry replaced, or removed if there is no value."""
    data = copy.deepcopy(data)
    *path, last = place
    target = data
    for key in path:
        target = target[key]
    if value:
        target[last] = value[0]
    else:
        del target[last]
    return data


def find(data_dir, split="train", split_by=None, name="refcoco") -> ReferFiles | None:
    return ReferFiles.find(SplitRequest.resolve(BENCHMARKS[name], Path(data_dir), split, split_by))


def load(data_dir, split="train", split_by=None, name="refcoco", **options):
    return open_source(find(data_dir, split, split_by, name), **options)


def rows(dataset) -> list[tuple]:
    columns = ("image_id", "ref_id", "ann_id", "sent_id", "expression")
    return [(*(row[column] for column in columns), pytest.approx(row["box"], rel=1e-6)) for row in dataset]


def test_rows(folder):
    dataset = load(folder)
    assert rows(dataset) == TRAIN
    assert [row["image"].size for row in dataset] == [(100, 80)] * 3 + [(20, 20)]
    assert set(dataset.column_names) == {"image", "image_id", "expression", "box", "ref_id", "ann_id", "sent_id"}


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_bytes_of_python_2(tmp_path, protocol):
    assert rows(load(write(tmp_path / "data", protocol=protocol))) == TRAIN


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bytes_of_python_3(folder, protocol):
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(DATA["refs"], protocol))
    assert rows(load(folder)) == TRAIN


@pytest.mark.parametrize(
    ("split", "expressions"), [("validation", ["in val"]), ("testA", ["in testA"]), ("testB", ["in testB"])]
)
def test_splits_are_exact(folder, split, expressions):
    dataset = load(folder, split)
    assert dataset["expression"][:] == expressions
    assert str(dataset.split) == split


def test_test_split_is_not_testa(tmp_path):
    data = changed(("refs", 3, "split"), "test")
    root = write(tmp_path / "data", data, split_by="google")
    assert load(root, "test", "google")["expression"][:] == ["in val"]


def test_streaming_and_processes_give_equal_rows(folder, tmp_path):
    streamed = load(folder, streaming=True)
    assert rows(streamed) == TRAIN
    assert streamed.num_shards == 2
    assert rows(load(folder, num_proc=2, cache_dir=str(tmp_path / "cache"))) == TRAIN


def test_ids_may_be_strings(tmp_path):
    data = changed(("refs", 0, "ann_id"), "1719310")
    data["refs"][0]["ref_id"] = "5_a"
    assert load(write(tmp_path / "data", data))["ref_id"][:] == ["5_a", "5_a", "7", "6"]


def test_segmentations_are_passed_over(tmp_path):
    name = 'a "segmentation": [[1, 2]] b.jpg'
    data = changed(("instances", "images", 0, "file_name"), name)
    data["instances"]["annotations"][1] = {"segmentation": [[1, 2], [3e-1]], **data["instances"]["annotations"][1]}
    root = write(tmp_path / "data", data)
    (root / TRAIN_2014 / "COCO_train2014_000000000007.jpg").rename(root / TRAIN_2014 / name)
    assert rows(load(root)) == TRAIN


# Where the files are


@pytest.mark.parametrize(
    ("name", "split_by", "files"),
    [
        ("refcoco", "google", "refcoco"),
        ("refcoco+", "unc", "refcoco+"),
        ("refcocog", "umd", "refcocog"),
        ("refcocog", "google", "refcocog"),
    ],
)
def test_benchmarks(tmp_path, name, split_by, files):
    root = write(tmp_path / "data", name=files, split_by=split_by)
    assert rows(load(root, "train", split_by, name)) == TRAIN
    assert find(root, "train", split_by, name).name == name


def test_referitgame(tmp_path):
    data = changed(("instances", "images", 1, "file_name"), "00/images/42.jpg")
    data["instances"]["images"][0]["file_name"] = "7.jpg"
    root = write(tmp_path / "data", data, name="refclef", split_by="berkeley")
    for number, size in ((42, (100, 80)), (7, (20, 20))):
        path = root / "images" / "saiapr_tc-12" / f"0{number % 2}" / "images" / f"{number}.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", size).save(path)
    assert rows(load(root, "train", "berkeley", "referitgame")) == TRAIN
    assert find(root, "train", "unc", "referitgame") is None
    assert find(root, "train", "standard", "referitgame") is None


def test_referitgame_is_identified_by_name(tmp_path):
    data = changed(("instances", "images", 1, "file_name"), "00/images/38685.jpg")
    source = find(write(tmp_path / "data", data, "refclef"), "train", "unc", "referitgame")
    assert [item.image_id for item in source.list_images()[0]] == ["38685", "COCO_train2014_000000000007"]


def test_places(tmp_path):
    root = write(tmp_path / "data").rename(tmp_path / "repository")
    assert find(root).refs_path == root / "refcoco" / "refs(unc).p"
    assert find(root / "refcoco").refs_path == root / "refcoco" / "refs(unc).p"
    (root / "data").mkdir()
    (root / "refcoco").rename(root / "data" / "refcoco")
    assert find(root).refs_path == root / "data" / "refcoco" / "refs(unc).p"
    (root / "data" / "refcoco").rename(root / "mine")
    assert find(root / "mine").refs_path == root / "mine" / "refs(unc).p"


def test_refcoco_is_not_taken_for_refcoco_plus(folder):
    assert find(folder, name="refcoco+") is None
    assert find(folder / "refcoco", name="refcoco+") is None


def test_missing_files(folder):
    assert find(folder, split_by="google") is None
    request = SplitRequest.resolve(BENCHMARKS["refcoco"], folder, "train")
    assert ReferFiles.looks_for(request) == "refcoco/refs(unc).p and instances.json"
    standard = SplitRequest.resolve(BENCHMARKS["referitgame"], folder, "train")
    assert ReferFiles.looks_for(standard).startswith('(for split_by="unc" or "berkeley" only) refclef/refs')
    (folder / "refcoco" / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no instances\.json in .*refcoco, expected refs\(unc\)\.p and"):
        find(folder)


# Images and the cache


def test_missing_images(folder):
    (folder / TRAIN_2014 / "COCO_train2014_000000000042.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*COCO_train2014_000000000042\.jpg"):
        load(folder)
    assert rows(load(folder, missing_images="skip")) == TRAIN[3:]
    kept = load(folder, missing_images="keep")
    assert rows(kept) == TRAIN
    assert [row["image"] is None for row in kept] == [True] * 3 + [False]


def test_unchanged_data_is_prepared_once(folder, monkeypatch):
    assert rows(load(folder)) == TRAIN
    monkeypatch.setattr(GroundingBuilder, "_generate_tables", None)
    assert rows(load(folder)) == TRAIN


def test_files_are_read_once_for_all_splits(folder, monkeypatch):
    assert rows(load(folder)) == TRAIN
    monkeypatch.setattr(refer_api, "read_pickle", None)
    assert load(folder, "validation")["expression"][:] == ["in val"]
    assert rows(load(folder, streaming=True)) == TRAIN


def test_problems_of_several_splits_are_kept_apart(tmp_path):
    data = changed(("refs", 3, "ann_id"))
    data["refs"][4]["split"] = None
    root = write(tmp_path / "data", data)
    for _ in range(2):
        for split, number in (("train", 1), ("validation", 2), ("testA", 1), ("testB", 1)):
            assert len(find(root, split).list_images()[1]) == number


def test_edited_files_are_seen(folder):
    assert rows(load(folder)) == TRAIN
    instances = folder / "refcoco" / "instances.json"
    instances.write_text(instances.read_text().replace("34.22", "34.32"))
    assert load(folder)[0]["box"] == pytest.approx([3.93, 9.99, 38.25, 27.41], rel=1e-6)
    refs = folder / "refcoco" / "refs(unc).p"
    refs.write_bytes(refs.read_bytes().replace(b"blue shirt", b"grey shirt"))
    assert load(folder)[1]["expression"] == "grey shirt"
    Image.new("RGB", (10, 10)).save(folder / TRAIN_2014 / "COCO_train2014_000000000007.jpg")
    with pytest.raises(ValueError, match=r"the box \[10\.5, 0\.25, 20, 20\] is not within the 10 x 10 pixels"):
        load(folder)


# Files of unknown origin

REF, IMAGE, ANNOTATION = ("refs", 0), ("instances", "images", 1), ("instances", "annotations", 2)
WITHOUT_REF, WITHOUT_IMAGE = [TRAIN[3], TRAIN[2]], [TRAIN[3]]
WITHOUT_SENT = [TRAIN[0], *TRAIN[2:]]
FIRST = "refs(unc).p, reference [0]"

# (place, new value if any, message, rows that are left)
PROBLEMS = [
    (REF, ["a ref"], f"{FIRST} is 'a ref', expected a dict.", WITHOUT_REF),
    ((*REF, "split"), [], f"{FIRST} has no split, expected a string.", WITHOUT_REF),
    ((*REF, "split"), [["train"]], f"{FIRST} has ['train'] as split, expected a string.", WITHOUT_REF),
    ((*REF, "ref_id"), [], f"{FIRST} has no ref_id, expected an integer or a string.", WITHOUT_REF),
    ((*REF, "ref_id"), [True], f"{FIRST} has True as ref_id, expected an integer or a string.", WITHOUT_REF),
    (("refs", 2, "ref_id"), [5], "[2] has the ref_id 5 of an earlier entry, expected", [*TRAIN[:2], TRAIN[3]]),
    ((*REF, "ann_id"), [{}], f"{FIRST} has {{}} as ann_id, expected an integer or a string.", WITHOUT_REF),
    ((*REF, "ann_id"), [88], f"{FIRST} has the ann_id 88, expected one that is in ", WITHOUT_REF),
    ((*REF, "ann_id"), [12], f"{FIRST} is of the image 42, but its annotation 12 in ", WITHOUT_REF),
    ((*REF, "image_id"), [43], f"{FIRST} has the image_id 43, expected one that is in ", WITHOUT_REF),
    ((*REF, "image_id"), [None], f"{FIRST} has None as image_id, expected an integer or a string.", WITHOUT_REF),
    ((*REF, "sentences"), [()], f"{FIRST} has () as sentences, expected a list.", WITHOUT_REF),
    ((*REF, "sentences"), [[]], f"{FIRST} has no sentences, expected at least one.", WITHOUT_REF),
    ((*REF, "sentences", 1), [3], f"{FIRST}, sentence [1] is 3, expected a dict.", WITHOUT_SENT),
    ((*REF, "sentences", 1, "sent"), [], f"{FIRST}, sentence [1] has no sent, ", WITHOUT_SENT),
    ((*REF, "sentences", 1, "sent"), [7], f"{FIRST}, sentence [1] has 7 as sent, ", WITHOUT_SENT),
    ((*REF, "sentences", 1, "sent"), [" "], f"{FIRST}, sentence [1]: the expression is ' '", WITHOUT_SENT),
    ((*REF, "sentences", 1, "sent_id"), [], f"{FIRST}, sentence [1] has no sent_id, ", WITHOUT_SENT),
    ((*REF, "sentences", 1, "sent_id"), [0], "[1] has the sent_id 0 of an earlier entry, ", WITHOUT_SENT),
    (IMAGE, [7], "instances.json, image [1] is 7, expected a dict.", WITHOUT_IMAGE),
    ((*IMAGE, "id"), [], "instances.json, image [1] has no id, expected an integer or a string.", WITHOUT_IMAGE),
    ((*IMAGE, "id"), [7], "instances.json, image [1] has the id 7 of an earlier entry, ", WITHOUT_IMAGE),
    ((*IMAGE, "file_name"), [], "instances.json has no file_name, expected a string.", WITHOUT_IMAGE),
    ((*IMAGE, "file_name"), ["/"], "instances.json has no name in its file_name, ", WITHOUT_IMAGE),
    (ANNOTATION, [[]], "instances.json, annotation [2] is [], expected a dict.", WITHOUT_REF),
    ((*ANNOTATION, "id"), [4.5], "instances.json, annotation [2] has 4.5 as id, expected an integer", WITHOUT_REF),
    ((*ANNOTATION, "id"), [13], "instances.json, annotation [2] has the id 13 of an earlier entry, ", WITHOUT_REF),
    ((*ANNOTATION, "image_id"), [], "instances.json has no image_id, ", WITHOUT_REF),
    ((*ANNOTATION, "image_id"), [7], "instances.json is of the image 7, expected the same.", WITHOUT_REF),
    ((*ANNOTATION, "bbox"), [], f"{FIRST}: annotation 1719310 in ", WITHOUT_REF),
    ((*ANNOTATION, "bbox"), [[1, 2, 3]], "has [1, 2, 3] as bbox, expected [x, y, width, height] in", WITHOUT_REF),
    ((*ANNOTATION, "bbox"), [[1, 2, 3, "4"]], "has [1, 2, 3, '4'] as bbox, expected [x, y, ", WITHOUT_REF),
    ((*ANNOTATION, "bbox"), [[1, 2, 3, float("nan")]], "has [1, 2, 3, nan] as bbox, ", WITHOUT_REF),
    ((*ANNOTATION, "bbox"), [[1, 2, float("inf"), 4]], "has [1, 2, inf, 4] as bbox, ", WITHOUT_REF),
    ((*ANNOTATION, "bbox"), [[10**400, 2, 3, 4]], "as bbox, expected [x, y, width, height] in pixels.", WITHOUT_REF),
    ((*ANNOTATION, "bbox"), [[1, 2, 0, 4]], f"{FIRST}, sentence [0]: the box [1, 2, 1, 6] is empty", TRAIN[2:]),
    ((*ANNOTATION, "bbox"), [[-9, 2, 10, 4]], f"{FIRST}, sentence [0]: the box [-9, 2, 1, 6] starts", TRAIN[2:]),
    # A box reaches beyond the image, so this is not the image that the boxes were drawn on.
    ((*ANNOTATION, "bbox"), [[50, 2, 52, 4]], "[50, 2, 102, 6] is not within the 100 x 80 pixels of", WITHOUT_IMAGE),
]


@pytest.mark.parametrize(("place", "value", "message", "left"), PROBLEMS)
def test_problems(tmp_path, caplog, place, value, message, left):
    root = write(tmp_path / "data", changed(place, *value))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(root)
    assert str(root / "refcoco") in str(error.value)
    assert len(str(error.value)) < 600
    with caplog.at_level(logging.WARNING, logger="epmvg_hf.data.builder"):
        assert rows(load(root, errors="skip", streaming=True)) == left
    assert message in caplog.text


def test_problems_are_counted_and_passed_over_alike(tmp_path):
    data = changed((*REF, "sentences", 1, "sent_id"), 0)
    data["refs"][2]["ref_id"] = 5
    root = write(tmp_path / "data", data)
    with pytest.raises(ValueError, match=r"\(1 more such problems\)"):
        list(load(root, streaming=True))
    assert rows(load(root, errors="skip")) == [TRAIN[0], TRAIN[3]]
    assert rows(load(root, errors="skip", streaming=True)) == [TRAIN[0], TRAIN[3]]


def test_other_splits_are_not_held_against_one(tmp_path):
    assert rows(load(write(tmp_path / "data", changed(("refs", 3, "ann_id"))))) == TRAIN


def test_file_names_do_not_lead_out(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"")
    root = write(tmp_path / "data", changed((*IMAGE, "file_name"), "../../../../../secret.jpg"))
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*one of them is secret\.jpg"):
        load(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "instances.json cannot be read as UTF-8 JSON"),
        (b"\xff\xfe\x00", "instances.json cannot be read as UTF-8 JSON"),
        (b"[" * 100_000, "instances.json cannot be read as UTF-8 JSON"),
        (b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", "instances.json cannot be read as UTF-8 JSON"),
        (b"[]", "instances.json is [], expected a dict"),
        (b'{"images": []}', "instances.json has no annotations, expected a list"),
        (b'{"images": {}}', "instances.json has {} as images, expected a list"),
    ],
)
def test_bad_instances(folder, content, message):
    (folder / "refcoco" / "instances.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder, errors="skip")


def test_huge_instances(folder, monkeypatch):
    monkeypatch.setattr(refer_api, "MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match=r"instances\.json has [\d,]+ bytes, expected at most 100\."):
        load(folder)


@pytest.mark.parametrize(("refs", "message"), [({}, "holds {}, expected a list"), ([], "holds [], expected a list")])
def test_bad_references(folder, refs, message):
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    with pytest.raises(ValueError, match=re.escape(f"refs(unc).p {message} of references")):
        load(folder, errors="skip")


def test_split_without_references(tmp_path):
    root = write(tmp_path / "data", {**DATA, "refs": DATA["refs"][:4]})
    with pytest.raises(FileNotFoundError, match=r"refs\(unc\)\.p has no reference of the split 'testB', only"):
        load(root, "testB")


class Call:
    def __reduce__(self):
        return eval, ("1 / 0",)


def test_nothing_is_executed(folder):
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Call()]))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p .*builtins\.eval"):
        load(folder)


# gRefCOCO, whose expressions name any number of objects

LADY, DOG = [3.93, 9.99, 38.15, 27.41], [0, 1, 2, 4]
# (image_id, ref_id, ann_ids, sent_id, expression, num_boxes, absent, box, boxes)
GROUP_ROWS = [
    ("42", "0", ["1719310"], "0", "the lady with the blue shirt", 1, False, LADY, [LADY]),
    ("42", "200000", ["13", "1719310"], "142300", "the dog and the lady", 2, False, [0, 1, 38.15, 27.41], [DOG, LADY]),
    ("42", "200000", ["13", "1719310"], "142301", "both", 2, False, [0, 1, 38.15, 27.41], [DOG, LADY]),
    ("7", "200001", [], "142302", "two zebras", 0, True, None, []),
]


def write_groups(root: Path, data: dict = GROUPS) -> Path:
    return write(root, data, "grefcoco")


def load_groups(data_dir, split="train", **options):
    return load_grounding_dataset("grefcoco", data_dir, split=split, **options)


def group_rows(dataset) -> list[tuple]:
    columns = ("image_id", "ref_id", "ann_ids", "sent_id", "expression", "num_boxes", "absent", "box")
    return [tuple(row[column] for column in columns) for row in dataset]


def in_float32(box: list[float] | None) -> list[float] | None:
    return None if box is None else np.float32(box).tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_groups_of_objects(tmp_path, streaming):
    root = write_groups(tmp_path / "data")
    dataset = load_groups(root, streaming=streaming)
    assert group_rows(dataset) == [(*row[:7], in_float32(row[7])) for row in GROUP_ROWS]
    assert dataset.features["absent"] == Value("bool") and "boxes" not in dataset.column_names
    each = load_groups(root, boxes="any", streaming=streaming)
    assert group_rows(each) == group_rows(dataset)
    assert [row["boxes"] for row in each] == [[in_float32(box) for box in row[8]] for row in GROUP_ROWS]


@pytest.mark.parametrize(("split", "absent"), [("validation", False), ("testA", True), ("testB", False)])
def test_splits_of_groups(tmp_path, split, absent):
    dataset = load_groups(write_groups(tmp_path / "data"), split)
    assert [(row["absent"], row["box"] is None) for row in dataset] == [(absent, absent)]


def test_absent_expressions_reach_training_and_do_not_count_in_baselines(tmp_path):
    dataset = load_groups(write_groups(tmp_path / "data"))
    groups = ImageGroups(dataset)
    groups.check_rows("train_dataset", needs_boxes=True)
    assert groups[1].boxes.tolist() == [[0] * 4] and len(groups[0].boxes) == 3
    expected = blind_accuracy(dataset.select(range(3)), dataset.select(range(3)))
    assert blind_accuracy(dataset, dataset) == expected


def test_ids_of_single_objects_need_no_list(tmp_path):
    data = copy.deepcopy(GROUPS)
    data["refs"][0] |= {"ann_id": 1719310}
    data["refs"][2] |= {"ann_id": -1}
    for ref in data["refs"]:
        del ref["no_target"]
    rows = group_rows(load_groups(write_groups(tmp_path / "data", data)))
    assert rows == [(*row[:7], in_float32(row[7])) for row in GROUP_ROWS]


GROUP = ("refs", 1)
FIRST_GROUP = "grefs(unc).json, reference [1]"
EXPECTED_GROUP = "expected [-1] and true, or the ids of annotations and false."
GROUP_PROBLEMS = [
    (GROUP, "a ref", f"{FIRST_GROUP} is 'a ref', expected a dict."),
    ((*GROUP, "ann_id"), {}, f"{FIRST_GROUP} has {{}} as ann_id, expected an id or a list of ids."),
    ((*GROUP, "ann_id"), [], f"{FIRST_GROUP} has [] as ann_id and False as no_target, {EXPECTED_GROUP}"),
    ((*GROUP, "ann_id"), [-1], f"{FIRST_GROUP} has [-1] as ann_id and False as no_target, {EXPECTED_GROUP}"),
    (
        (*GROUP, "no_target"),
        True,
        f"{FIRST_GROUP} has [13, 1719310] as ann_id and True as no_target, {EXPECTED_GROUP}",
    ),
    ((*GROUP, "no_target"), 0, f"{FIRST_GROUP} has [13, 1719310] as ann_id and 0 as no_target, {EXPECTED_GROUP}"),
    ((*GROUP, "ann_id"), [13, -1], f"{FIRST_GROUP} has the ann_id -1, expected one that is in "),
    ((*GROUP, "ann_id"), [13, None], f"{FIRST_GROUP} has None as ann_id, expected an integer or a string."),
    ((*GROUP, "ann_id"), [13, 13], f"{FIRST_GROUP} has the ann_id 13 twice, expected each once."),
    ((*GROUP, "ann_id"), [13, 12], f"{FIRST_GROUP} is of the image 42, but its annotation 12 in "),
    ((*GROUP, "image_id"), 43, f"{FIRST_GROUP} has the image_id 43, expected one that is in "),
    ((*GROUP, "sentences"), [], f"{FIRST_GROUP} has no sentences, expected at least one."),
    (("instances", "annotations", 0, "bbox"), [0, 1, 2], f"{FIRST_GROUP}: annotation 13 in "),
    # Each box is checked, also where the box around all of them would be right.
    (
        ("instances", "annotations", 0, "bbox"),
        [5, 10, 0, 3],
        f"{FIRST_GROUP}, sentence [0]: the box [5, 10, 5, 13] is",
    ),
]


@pytest.mark.parametrize(("place", "value", "message"), GROUP_PROBLEMS)
def test_problems_of_groups(tmp_path, caplog, place, value, message):
    root = write_groups(tmp_path / "data", changed(place, value, data=GROUPS))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_groups(root)
    assert str(root / "grefcoco") in str(error.value) and len(str(error.value)) < 600
    with caplog.at_level(logging.WARNING, logger="epmvg_hf.data.builder"):
        rows = group_rows(load_groups(root, errors="skip"))
    assert [row[1] for row in rows] == ["0", "200001"]
    assert message in caplog.text


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as UTF-8 JSON"), ("{}", "holds {}, expected")])
def test_bad_files_of_groups(tmp_path, content, message):
    root = write_groups(tmp_path / "data")
    (root / "grefcoco" / "grefs(unc).json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"grefs(unc).json {message}")):
        load_groups(root, errors="skip")


def test_files_of_groups_are_not_taken_for_others(tmp_path):
    root = write_groups(tmp_path / "data")
    assert find(root / "grefcoco", name="grefcoco").refs_path == root / "grefcoco" / "grefs(unc).json"
    assert find(root / "grefcoco") is None
    message = (
        r"no files of the train split of gRefCOCO in .*, expected grefcoco/grefs\(unc\)\.json and instances\.json"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_groups(write(tmp_path / "other"))
    (root / "grefcoco" / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no instances\.json in .*, expected grefs\(unc\)\.json and"):
        load_groups(root)


# The real files


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the real annotations")
@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_real_validation_split(name, tmp_path):
    request = SplitRequest.resolve(BENCHMARKS[name], REAL_DATA / "refcoco", "val")
    options = {"missing_images": "keep", "cache_dir": str(tmp_path)}
    dataset = open_source(ReferFiles.find(request), **options).remove_columns("image")
    counts = request.benchmark.counts[request.split_by, "validation"]
    assert len(dataset) == counts.expressions == len(set(dataset["sent_id"]))
    assert len(set(dataset["ref_id"])) == counts.references
    assert len(set(dataset["image_id"])) == counts.images
    data = REAL_DATA / "refcoco" / name
    boxes = {str(a["id"]): a["bbox"] for a in json.loads((data / "instances.json").read_text())["annotations"]}
    for row in dataset.select(range(0, len(dataset), 97)):
        x, y, width, height = boxes[row["ann_id"]]
        assert row["box"] == pytest.approx([x, y, x + width, y + height], rel=1e-6)

    index = IndexFile.find(SplitRequest.resolve(BENCHMARKS[name], REAL_DATA / "transvg_index", "val"))
    assert contents(open_source(index, **options).remove_columns("image")) == contents(dataset)


def contents(dataset) -> Counter:
    return Counter((row["image_id"], row["ann_id"], row["expression"], *row["box"]) for row in dataset)
