"""
RefCOCO, RefCOCO+, RefCOCOg and ReferItGame ("refclef") from the files of the refer API (lichengunc/refer on GitHub),
and gRefCOCO from those of its sequel (henghuiding/gRefCOCO), one row per sentence.

There are two files. `refs(<split_by>).p` is a pickled list of references: an annotation, its split, and the sentences
that single the annotated object out. `instances.json` has images and annotations as COCO has them, with boxes
`[x, y, width, height]` in pixels, counted from 0 and not rounded.

gRefCOCO has `grefs(unc).json` instead, where a reference is to any number of annotations: `ann_id` is a list of them,
which is `[-1]` and beside which `no_target` is true where the sentences are true of nothing in the image.
"""

import pickle
import re
import reprlib
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from ..annotations import AnnotatedImage, box_around, is_box
from ..benchmarks import SplitRequest, short_split_name
from ..files.image_files import ImageFolders, file_statuses
from ..files.json_files import read_json
from ..files.safe_pickle import read_pickle
from .source import GroundingSource, digest_files

FOLDERS = {
    "refcoco": "refcoco",
    "refcoco+": "refcoco+",
    "refcocog": "refcocog",
    "grefcoco": "grefcoco",
    "referitgame": "refclef",
}
NOTHING = -1  # the id in place of annotations in a reference of gRefCOCO that is to nothing

MAX_JSON_BYTES = 2**30  # a bound on files of unknown origin; RefCOCO's has about 120 MB

# The outlines of objects, which are not needed but make up most of instances.json. Dropping them before the file is
# parsed saves 4 of 5 seconds and 600 of 850 MB. Within a text, these quotes would be escaped, so this is always a key.
_OUTLINES = re.compile(rb'"segmentation"\s*:\s*\[[][0-9.,eE+\s-]*\]')

_ID, _STRING, _LIST, _IDS = (int, str), (str,), (list,), (list, int, str)
_EXPECTED: dict[tuple[type, ...], str] = {
    _ID: "an integer or a string",
    _STRING: "a string",
    _LIST: "a list",
    _IDS: "an id or a list of ids",
}


class ReferFiles(GroundingSource):
    """
    One split from the refer API's files. A row is one sentence, with `sent` as its expression: the cleaned text that
    users of the API train and evaluate on.

    The API's own `getRefIds(split="test")` also returns testA, testB and testC. Here "test" means that split alone.

    Args:
        name (`str`): The benchmark.
        folder (`Path`): The folder with the references, such as `refs(<split_by>).p`, and `instances.json`.
        split (`str`): `"train"`, `"validation"`, `"test"`, `"testA"`, `"testB"` or `"testC"`.
        split_by (`str`): `"unc"`, `"google"`, `"umd"` or `"berkeley"`.
        images ([`ImageFolders`]): The images, under the file names in `instances.json`.
        boxes (`str`, *optional*, defaults to `"union"`):
            In gRefCOCO, `box` is the smallest box around all objects of the reference. With `"any"`, the column
            `boxes` also has the box of each.

    Raises:
        `FileNotFoundError`: One of the two files is missing.
    """

    images: ImageFolders

    def __init__(self, name: str, folder: Path, split: str, split_by: str, images: ImageFolders, boxes: str = "union"):
        self.name, self.split, self.images = name, split, images
        self.refs_path, self.instances_path = folder / _refs_name(name, split_by), folder / "instances.json"
        for path in (self.refs_path, self.instances_path):
            if not path.is_file():
                raise FileNotFoundError(
                    f"no {path.name} in {folder}, expected {self.refs_path.name} and instances.json."
                )
        string = datasets.Value("string")
        self.columns = {"ref_id": string, "ann_id": string, "sent_id": string}
        if name == "grefcoco":
            self.columns = {
                "ref_id": string,
                "ann_ids": datasets.List(string),
                "sent_id": string,
                "num_boxes": datasets.Value("int32"),
                "absent": datasets.Value("bool"),
            }
        if boxes == "any":
            self.columns["boxes"] = datasets.List(datasets.List(datasets.Value("float32"), length=4))

    @classmethod
    def find(cls, request: SplitRequest) -> "ReferFiles | None":
        name, data_dir = request.benchmark.name, request.data_dir
        if request.split_by == "standard":  # ReferItGame's split for phrase grounding, which the refer API lacks
            return None
        places = [data_dir / FOLDERS[name], data_dir / "data" / FOLDERS[name]]
        # The folder itself may hold the files, unless its name says that they are of another benchmark: RefCOCO and
        # RefCOCO+ both have a refs(unc).p.
        if data_dir.name not in set(FOLDERS.values()) - {FOLDERS[name]}:
            places.append(data_dir)
        for folder in places:
            if (folder / _refs_name(name, request.split_by)).is_file():
                return cls(name, folder, request.split, request.split_by, request.images, request.boxes)
        return None

    @classmethod
    def looks_for(cls, request: SplitRequest) -> str:
        folder = FOLDERS[request.benchmark.name]
        if request.split_by == "standard":
            return f'(for split_by="unc" or "berkeley" only) {folder}/refs(<split_by>).p and instances.json'
        return f"{folder}/{_refs_name(request.benchmark.name, request.split_by)} and instances.json"

    def fingerprint(self) -> str:
        """A digest of both files, of the sizes and times of change of all images, and of the choice of columns."""
        of_boxes = ["boxes"] if "boxes" in self.columns else []
        statuses = file_statuses(self.images.paths.values())
        return digest_files([self.refs_path, self.instances_path], statuses, *of_boxes)

    def list_images(self) -> tuple[list[AnnotatedImage], list[str]]:
        digest = digest_files([self.refs_path, self.instances_path])
        splits, problems = _read_splits(self.name, self.refs_path, self.instances_path, digest)
        split = short_split_name(self.split)
        if split not in splits and not problems:
            raise FileNotFoundError(
                f"{self.refs_path} has no reference of the split {split!r}, only of {', '.join(sorted(splits))}."
            )
        images, problems_of_split = pickle.loads(splits[split]) if split in splits else ([], [])
        return images, problems + problems_of_split


@lru_cache(maxsize=1)
def _read_splits(name: str, refs_path: Path, instances_path: Path, digest: str) -> tuple[dict[str, bytes], list[str]]:
    """
    Reads all splits. The result for the last files is kept in memory, because all splits are in the same files, and
    reading these takes longer than preparing the rows of any split except train.

    Args:
        name (`str`): The benchmark.
        refs_path, instances_path (`Path`): The files.
        digest (`str`): A digest of both files, so that changed files are read again.

    Returns:
        `tuple`: For each split, a pickle of its list of [`AnnotatedImage`] and of a sentence for each entry that
        cannot be used; and a sentence for each such entry that belongs to no split or to all. It is safe to load
        these pickles, as this process has made them. Kept as objects, the splits of RefCOCO would take 180 MB more
        memory for as long as the process lives.
    """
    images, annotations, problems = _read_instances(instances_path)
    splits: dict[str, tuple[dict[str, AnnotatedImage], list[str]]] = {}
    known_ids: set[tuple[str, str, str]] = set()  # split, name of the id, id
    for number, ref in enumerate(_read_refs(refs_path)):
        where = f"{refs_path}, reference [{number}]"
        try:
            split = _field(ref, "split", _STRING, where)
        except ValueError as error:
            problems.append(str(error))
            continue
        found, problems_of_split = splits.setdefault(split, ({}, []))
        try:
            image = _entry_named_by(ref, "image_id", images, where, instances_path)
            objects = _read_objects(ref, annotations, where, instances_path, several=name == "grefcoco")
            file_name = _file_name(image, f"{where}: image {ref['image_id']} in {instances_path}")
            ids, boxes = list(objects), list(objects.values())
            shared: dict[str, Any] = {"ref_id": _new_id(ref, "ref_id", split, known_ids, where)}
            shared["box"] = box_around(boxes) if boxes else None
            if name == "grefcoco":
                shared |= {"ann_ids": ids, "boxes": boxes, "num_boxes": len(ids), "absent": not ids}
            else:
                (shared["ann_id"],) = ids
            sentences = _field(ref, "sentences", _LIST, where)
            if not sentences:
                raise ValueError(f"{where} has no sentences, expected at least one.")
        except ValueError as error:
            problems_of_split.append(str(error))
            continue
        # The other formats of ReferItGame know an image by the name of its file only.
        image_id = PurePosixPath(file_name).stem if name == "referitgame" else str(ref["image_id"])
        for index, sentence in enumerate(sentences):
            place = f"{where}, sentence [{index}]"
            try:
                expression = _field(sentence, "sent", _STRING, place)
                sent_id = _new_id(sentence, "sent_id", split, known_ids, place)
            except ValueError as error:
                problems_of_split.append(str(error))
                continue
            # The image gets no size, so that boxes are never scaled: copies of COCO hold the original images, and the
            # sizes in instances.json may be placeholders of a conversion.
            rows = found.setdefault(image_id, AnnotatedImage(file_name, image_id, None, [])).rows
            rows.append({"where": place, "expression": expression, "sent_id": sent_id, **shared})
    pickles = {split: pickle.dumps((list(found.values()), more)) for split, (found, more) in splits.items()}
    return pickles, problems


def _refs_name(name: str, split_by: str) -> str:
    return f"grefs({split_by}).json" if name == "grefcoco" else f"refs({split_by}).p"


def _read_refs(path: Path) -> list[Any]:
    refs = read_json(path, MAX_JSON_BYTES) if path.suffix == ".json" else read_pickle(path)
    if type(refs) is not list or not refs:
        raise ValueError(f"{path} holds {reprlib.repr(refs)}, expected a list of references.")
    return refs


def _read_instances(path: Path) -> tuple[dict[str, dict], dict[str, dict], list[str]]:
    """Images and annotations by id, not checked any further, and a sentence for each that has no id of its own."""
    instances = read_json(path, MAX_JSON_BYTES, edit=partial(_OUTLINES.sub, b'"segmentation":[]'))
    problems: list[str] = []
    images, annotations = (
        _by_id(_field(instances, f"{kind}s", _LIST, str(path)), f"{path}, {kind}", problems)
        for kind in ("image", "annotation")
    )
    return images, annotations, problems


def _by_id(entries: list, what: str, problems: list[str]) -> dict[str, dict]:
    """Entries by their id. Of several with the same id, the first counts and the others are problems."""
    found: dict[str, dict] = {}
    for number, entry in enumerate(entries):
        where = f"{what} [{number}]"
        try:
            key = _id(entry, "id", where)
            if key in found:
                shown = reprlib.repr(entry["id"])
                raise ValueError(f"{where} has the id {shown} of an earlier entry, expected each id once.")
            found[key] = entry
        except ValueError as error:
            problems.append(str(error))
    return found


def _entry_named_by(ref: dict, name: str, entries: dict[str, dict], where: str, path: Path) -> dict:
    """The image or annotation that a reference names by its id."""
    key = _id(ref, name, where)
    if key not in entries:
        raise ValueError(f"{where} has the {name} {reprlib.repr(ref[name])}, expected one that is in {path}.")
    return entries[key]


def _read_objects(
    ref: dict, annotations: dict[str, dict], where: str, path: Path, several: bool
) -> dict[str, list[float]]:
    """
    The boxes of the objects that a reference is to, by the ids of their annotations: of one, or, with `several`, of
    as many as there are.
    """
    if not several:
        ids = [_field(ref, "ann_id", _ID, where)]
    else:
        ids = _field(ref, "ann_id", _IDS, where)
        ids = ids if isinstance(ids, list) else [ids]
        is_to_nothing = ids == [NOTHING]
        no_target = ref.get("no_target", is_to_nothing)
        if not ids or no_target is not is_to_nothing:
            raise ValueError(
                f"{where} has {reprlib.repr(ids)} as ann_id and {reprlib.repr(no_target)} as no_target, expected "
                "[-1] and true, or the ids of annotations and false."
            )
        if is_to_nothing:
            return {}
    objects: dict[str, list[float]] = {}
    for ann_id in ids:
        annotation = _entry_named_by({"ann_id": ann_id}, "ann_id", annotations, where, path)
        place = f"{where}: annotation {ann_id} in {path}"
        owner = _id(annotation, "image_id", place)
        if owner != str(ref["image_id"]):
            raise ValueError(
                f"{where} is of the image {ref['image_id']}, but its annotation {ann_id} in {path} is of the image "
                f"{owner}, expected the same."
            )
        if str(ann_id) in objects:
            raise ValueError(f"{where} has the ann_id {ann_id} twice, expected each once.")
        objects[str(ann_id)] = _read_box(annotation, place)
    return objects


def _file_name(image: dict, entry: str) -> str:
    """The name of the image file. It is in the entry of the image: no file has the `file_name` of a reference."""
    # ReferItGame's names may begin with folders, as "00/images/25.jpg", but images are looked up by file name.
    name = PurePosixPath(_field(image, "file_name", _STRING, entry)).name
    if not name:
        raise ValueError(f"{entry} has no name in its file_name, expected that of an image file.")
    return name


def _read_box(annotation: dict, where: str) -> list[float]:
    """
    The box of an annotation as xyxy float pixels, 0-based and half-open. COCO's boxes are half-open already:
    `x + width` is where the object ends.
    """
    bbox = _field(annotation, "bbox", _LIST, where)
    if not is_box(bbox):
        raise ValueError(f"{where} has {reprlib.repr(bbox)} as bbox, expected [x, y, width, height] in pixels.")
    x, y, width, height = bbox
    return [x, y, x + width, y + height]


def _new_id(entry: Any, name: str, split: str, known_ids: set[tuple[str, str, str]], where: str) -> str:
    """An id, which is added to the known ones; a `ValueError` if an entry of the same split has it already."""
    key = _id(entry, name, where)
    if (split, name, key) in known_ids:
        raise ValueError(
            f"{where} has the {name} {reprlib.repr(entry[name])} of an earlier entry, expected each {name} once."
        )
    known_ids.add((split, name, key))
    return key


def _id(entry: Any, name: str, where: str) -> str:
    return str(_field(entry, name, _ID, where))


def _field(entry: Any, name: str, kinds: tuple[type, ...], where: str) -> Any:
    """A field of a dict; a `ValueError` if it is missing or of another type (`True` is not taken for an integer)."""
    if type(entry) is not dict:
        raise ValueError(f"{where} is {reprlib.repr(entry)}, expected a dict.")
    if name not in entry:
        raise ValueError(f"{where} has no {name}, expected {_EXPECTED[kinds]}.")
    if type(entry[name]) not in kinds:
        raise ValueError(f"{where} has {reprlib.repr(entry[name])} as {name}, expected {_EXPECTED[kinds]}.")
    return entry[name]
