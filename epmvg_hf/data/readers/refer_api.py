"""The files of the refer API: RefCOCO, RefCOCO+, RefCOCOg and ReferItGame ("refclef"), one row per sentence.

The format (https://github.com/lichengunc/refer) has two files. `refs(<split_by>).p` is a pickled list of references:
an annotation, its split, and the sentences that single the annotated object out. `instances.json` has images and
annotations as COCO has them, with boxes `[x, y, width, height]` in pixels, counted from 0 and not rounded.
"""

import gc
import pickle
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from ..annotations import AnnotatedImage, is_box
from ..benchmarks import Wanted, short_split_name
from ..files.image_files import ImageFolders, file_statuses
from ..files.json_files import read_json
from ..files.safe_pickle import read_pickle
from .source import GroundingSource, digest_files

FOLDERS = {"refcoco": "refcoco", "refcoco+": "refcoco+", "refcocog": "refcocog", "referitgame": "refclef"}

MAX_JSON_BYTES = 2**30  # a bound on files of unknown origin; those of RefCOCO have some 120 MB

# Outlines of objects, most of instances.json. Its quotes make it a key: within a string they would be escaped.
POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[][0-9.,eE+\s-]*\]')

ID, STRING, LIST = (int, str), (str,), (list,)
EXPECTED: dict[tuple[type, ...], str] = {ID: "an integer or a string", STRING: "a string", LIST: "a list"}


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's garbage collector would go through a million new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ReferFiles(GroundingSource):
    """
    One split from the refer API's files. A row is one sentence: `expression` is its `sent`, the cleaned text that the
    API's users take.

    The API's own `getRefIds(split="test")` also gives testA, testB and testC; here a split is that split alone.

    Args:
        name (`str`): of the benchmark.
        folder (`Path`): the folder with `refs(<split_by>).p` and `instances.json`.
        split (`str`): `"train"`, `"validation"`, `"test"`, `"testA"`, `"testB"` or `"testC"`.
        split_by (`str`): `"unc"`, `"google"`, `"umd"` or `"berkeley"`.
        images ([`ImageFolders`]): the images, under the file names in `instances.json`.

    Raises:
        `FileNotFoundError`: One of the two files is missing.
    """

    images: ImageFolders

    def __init__(self, name: str, folder: Path, split: str, split_by: str, images: ImageFolders):
        self.name, self.split, self.images = name, split, images
        self.refs_path, self.instances_path = folder / f"refs({split_by}).p", folder / "instances.json"
        for path in (self.refs_path, self.instances_path):
            if not path.is_file():
                raise FileNotFoundError(f"no {path.name} in {folder}, expected refs({split_by}).p and instances.json.")
        self.columns = {column: datasets.Value("string") for column in ("ref_id", "ann_id", "sent_id")}

    @classmethod
    def find(cls, wanted: Wanted) -> "ReferFiles | None":
        name, data_dir = wanted.benchmark.name, wanted.data_dir
        if wanted.split_by == "standard":  # the way of ReferItGame that the refer API does not have
            return None
        places = [data_dir / FOLDERS[name], data_dir / "data" / FOLDERS[name]]
        if data_dir.name not in set(FOLDERS.values()) - {FOLDERS[name]}:  # RefCOCO+ has a refs(unc).p as RefCOCO has
            places.append(data_dir)
        for folder in places:
            if (folder / f"refs({wanted.split_by}).p").is_file():
                return cls(name, folder, wanted.split, wanted.split_by, wanted.images)
        return None

    @classmethod
    def looks_for(cls, wanted: Wanted) -> str:
        folder = FOLDERS[wanted.benchmark.name]
        if wanted.split_by == "standard":
            return f'(for split_by="unc" or "berkeley" only) {folder}/refs(<split_by>).p and instances.json'
        return f"{folder}/refs({wanted.split_by}).p and instances.json"

    def fingerprint(self) -> str:
        """Digest of both files, and of what is known of all images without opening one."""
        return digest_files([self.refs_path, self.instances_path], file_statuses(self.images.paths.values()))

    @collector_paused()
    def list_images(self) -> tuple[list[AnnotatedImage], list[str]]:
        digest = digest_files([self.refs_path, self.instances_path])
        splits, problems = read_splits(self.name, self.refs_path, self.instances_path, digest)
        wanted = short_split_name(self.split)
        if wanted not in splits and not problems:
            raise FileNotFoundError(
                f"{self.refs_path} has no reference of the split {wanted!r}, only of {', '.join(sorted(splits))}."
            )
        images, more = pickle.loads(splits[wanted]) if wanted in splits else ([], [])
        return images, problems + more


@lru_cache(maxsize=1)  # reading is most of the time that it takes to prepare the few rows of val, testA and testB
def read_splits(name: str, refs_path: Path, instances_path: Path, digest: str) -> tuple[dict[str, bytes], list[str]]:
    """
    What is in the files, of which the last ones are remembered.

    Args:
        name (`str`): of the benchmark.
        refs_path, instances_path (`Path`): the files.
        digest (`str`): of their content: they are read again when that is another.

    Returns:
        `tuple`: By split, a list of [`AnnotatedImage`] and one of what is wrong with its references; and what is wrong
        whatever the split. Those lists are pickled, by this process for itself, which makes 23 MB of RefCOCO. As
        objects they would keep 370 MB from being used again, most of it gaps between them.
    """
    images, annotations, problems = read_instances(instances_path)
    splits: dict[str, tuple[dict[str, AnnotatedImage], list[str]]] = {}
    known: defaultdict[str, dict[str, set[str]]] = defaultdict(lambda: {"ref_id": set(), "sent_id": set()})  # by split
    for number, ref in enumerate(read_refs(refs_path)):
        where = f"{refs_path}, reference [{number}]"
        try:
            split = field_of(ref, "split", STRING, where)
        except ValueError as error:
            problems.append(str(error))
            continue
        found, problems_of_split = splits.setdefault(split, ({}, []))
        try:
            image = listed(ref, "image_id", images, where, instances_path)
            annotation = listed(ref, "ann_id", annotations, where, instances_path)
            file_name = identify_image(ref, annotation, image, where, instances_path)
            # ReferItGame's other formats know an image by its name only.
            image_id = PurePosixPath(file_name).stem if name == "referitgame" else str(ref["image_id"])
            shared = {
                "box": read_box(annotation, f"{where}: annotation {ref['ann_id']} in {instances_path}"),
                "ref_id": new_id_of(ref, "ref_id", known[split], where),
                "ann_id": str(ref["ann_id"]),
            }
            sentences = field_of(ref, "sentences", LIST, where)
        except ValueError as error:
            problems_of_split.append(str(error))
            continue
        rows, bad_sentences = read_sentences(sentences, known[split], where)
        problems_of_split += bad_sentences
        if rows:
            # No size, so that boxes are never scaled: they are in pixels of the original image, which is the one
            # that everybody has, and the sizes in instances.json may be placeholders of a conversion.
            target = found.setdefault(image_id, AnnotatedImage(file_name, image_id, None, []))
            target.rows += [row | shared for row in rows]
    return {split: pickle.dumps((list(found.values()), more)) for split, (found, more) in splits.items()}, problems


def read_refs(path: Path) -> list[Any]:
    """The references; a `ValueError` if the file has no list of them."""
    refs = read_pickle(path)
    if type(refs) is not list or not refs:
        raise ValueError(f"{path} holds {reprlib.repr(refs)}, expected a list of references.")
    return refs


def identify_image(ref: dict, annotation: dict, image: dict, where: str, path: Path) -> str:
    """The name of the image file; the `file_name` of a reference is that of no file."""
    owner = id_of(annotation, "image_id", f"{where}: annotation {ref['ann_id']} in {path}")
    if owner != str(ref["image_id"]):
        raise ValueError(
            f"{where} is of the image {ref['image_id']}, but its annotation {ref['ann_id']} in "
            f"{path} is of the image {owner}, expected the same."
        )
    entry = f"{where}: image {owner} in {path}"
    # ReferItGame's may be in folders, as in "00/images/25.jpg". Ours are found by the last part.
    name = PurePosixPath(field_of(image, "file_name", STRING, entry)).name
    if not name:
        raise ValueError(f"{entry} has no name in its file_name, expected that of an image file.")
    return name


def read_instances(path: Path) -> tuple[dict[str, dict], dict[str, dict], list[str]]:
    """Images and annotations by id, not checked any further, and what is wrong with those without own id."""
    # Without the outlines, which are not used, this takes a fifth of the time and of the memory.
    instances = read_json(path, MAX_JSON_BYTES, partial(POLYGONS.sub, b'"segmentation":[]'))
    images, problems = by_id(field_of(instances, "images", LIST, str(path)), f"{path}, image")
    annotations, more = by_id(field_of(instances, "annotations", LIST, str(path)), f"{path}, annotation")
    return images, annotations, problems + more


def by_id(entries: list, what: str) -> tuple[dict[str, dict], list[str]]:
    """Entries by their id, and what is wrong with the others. Of several with one id the first counts."""
    found, problems = {}, []
    for number, entry in enumerate(entries):
        where = f"{what} [{number}]"
        try:
            key = id_of(entry, "id", where)
            if key in found:
                raise ValueError(
                    f"{where} has the id {reprlib.repr(entry['id'])} of one before it, expected each id once."
                )
            found[key] = entry
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def read_sentences(sentences: list, known: dict[str, set[str]], where: str) -> tuple[list[dict], list[str]]:
    """Rows with what each sentence of a reference has of its own, and what is wrong with the other sentences."""
    if not sentences:
        return [], [f"{where} has no sentences, expected at least one."]
    rows, problems = [], []
    for number, sentence in enumerate(sentences):
        place = f"{where}, sentence [{number}]"
        try:
            expression = field_of(sentence, "sent", STRING, place)
            sent_id = new_id_of(sentence, "sent_id", known, place)
            rows.append({"where": place, "expression": expression, "sent_id": sent_id})
        except ValueError as error:
            problems.append(str(error))
    return rows, problems


def read_box(annotation: dict, where: str) -> list[float]:
    """xyxy float pixels, 0-based and half-open, as COCO's boxes are: `x + width` is where the object ends."""
    bbox = field_of(annotation, "bbox", LIST, where)
    if not is_box(bbox):
        raise ValueError(f"{where} has {reprlib.repr(bbox)} as bbox, expected [x, y, width, height] in pixels.")
    x, y, width, height = bbox
    return [x, y, x + width, y + height]


def listed(ref: dict, name: str, entries: dict[str, dict], where: str, path: Path) -> dict:
    """The image or annotation that a reference names."""
    key = id_of(ref, name, where)
    if key not in entries:
        raise ValueError(f"{where} has the {name} {reprlib.repr(ref[name])}, expected one that is in {path}.")
    return entries[key]


def new_id_of(entry: Any, name: str, known: dict[str, set[str]], where: str) -> str:
    """An id that no entry before had. It is known from now on."""
    key = id_of(entry, name, where)
    if key in known[name]:
        raise ValueError(
            f"{where} has the {name} {reprlib.repr(entry[name])} of one before it, expected each {name} once."
        )
    known[name].add(key)
    return key


def id_of(entry: Any, name: str, where: str) -> str:
    """An id as text; a `ValueError` if it is missing, or neither an integer nor a string."""
    return str(field_of(entry, name, ID, where))


def field_of(entry: Any, name: str, kinds: tuple[type, ...], where: str) -> Any:
    """A field of a dict; a `ValueError` if it is not there or of another type (`True` is no integer)."""
    if type(entry) is not dict:
        raise ValueError(f"{where} is {reprlib.repr(entry)}, expected a dict.")
    if name not in entry:
        raise ValueError(f"{where} has no {name}, expected {EXPECTED[kinds]}.")
    if type(entry[name]) not in kinds:
        raise ValueError(f"{where} has {reprlib.repr(entry[name])} as {name}, expected {EXPECTED[kinds]}.")
    return entry[name]
