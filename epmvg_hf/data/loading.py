"""One function that loads any of the benchmarks, or your own data, as rows of image, expression and box."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils import needs_extra
from .benchmarks import Benchmark, SplitRequest, full_split_name, resolve_name

if TYPE_CHECKING:
    import datasets

    from .readers.source import GroundingSource


def load_grounding_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    split: str = "train",
    split_by: str | None = None,
    missing_images: str = "error",
    streaming: bool = False,
    seed: int = 0,
    num_images: int | None = None,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    errors: str = "raise",
    exclude: Iterable[str | int] | os.PathLike = (),
    image_dir: str | os.PathLike | None = None,
    source: str | None = None,
    boxes: str = "union",
    box_format: str | None = None,
    columns: dict[str, str] | None = None,
    absent_per_image: int | None = None,
) -> "datasets.Dataset | datasets.IterableDataset":
    """
    Loads one split of a visual grounding benchmark, or of your own data, with one row per expression. The rows of one
    image are consecutive. Nothing is downloaded, and nothing in a file is executed.

    Args:
        name (`str`):
            `"refcoco"`, `"refcoco+"`, `"refcocog"`, `"referitgame"`, `"flickr30k_entities"`, `"custom"` (your own
            data, see [`~custom.CustomData`]) or `"shapes"` (scenes that are drawn on the spot). Other common names are
            understood as well, and so are names that include the way to split: `"refcocoplus"`, `"refcocog_google"`,
            `"unc"`, `"gref_umd"`, ...
        data_dir (`str` or `os.PathLike`, *optional*):
            Folder with the benchmark's files, in the layout of any `source` below. Required, except for `"shapes"`,
            which has no files.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"` (or `"val"`), `"test"`, and where the benchmark has them `"testA"`, `"testB"`,
            `"testC"`, `"trainval"`; for `"shapes"` also `"test_composition"`; for `"custom"` any name.
        split_by (`str`, *optional*):
            Which of several published ways to split a benchmark: `"unc"` or `"google"` for RefCOCO, `"umd"` or
            `"google"` for RefCOCOg, `"standard"`, `"unc"` or `"berkeley"` for ReferItGame. The first is the default.
        missing_images (`str`, *optional*, defaults to `"error"`):
            What to do if the files of some images are missing: `"error"`, `"skip"` (leave out their rows) or `"keep"`
            (give their rows with `None` as image). Not for `"shapes"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to make rows while iterating instead of preparing all of them in the cache first. Only images that
            are inside parquet files are written to the cache even so.
        seed (`int`, *optional*, defaults to 0):
            Seed of the scenes. Only for `"shapes"`.
        num_images (`int`, *optional*):
            Number of scenes. Only for `"shapes"`.
        num_proc (`int`, *optional*):
            Number of processes that prepare the rows. Has no effect when streaming.
        cache_dir (`str`, *optional*):
            Where prepared rows are kept. Defaults to the cache of `datasets`.
        errors (`str`, *optional*, defaults to `"raise"`):
            What to do about annotations and images that cannot be used: `"raise"` an error for the first of them, or
            `"skip"` them and log what was left out. Not for `"shapes"`.
        exclude (`Iterable[str or int]` or `os.PathLike`, *optional*):
            Ids of images to leave out, or a file of such ids as `epmvg exclude-images` writes it. Not for `"shapes"`.
        image_dir (`str` or `os.PathLike`, *optional*):
            Folder with the images, if they are not in one of the usual places below `data_dir`. Not for `"shapes"`.
        source (`str`, *optional*):
            Which kind of files to read, if `data_dir` has several: `"refer"` (the refer API's pickles and
            `instances.json`), `"index"` (the `.pth` files of TransVG and its successors), `"parquet"` (files of
            `lmms-lab/RefCOCO` or `jxu124/refcoco`) or `"official"` (JSON files of ReferItGame, XML and text of
            Flickr30K Entities). By default the first kind that is there.
        boxes (`str`, *optional*, defaults to `"union"`):
            For Flickr30K Entities and gRefCOCO, `"any"` adds the column `boxes` with each annotated box of the
            expression.
        box_format (`str`, *optional*):
            `"xyxy"` or `"xywh"`, in pixels. Only for `"custom"`, where JSONL and CSV files require it.
        columns (`dict[str, str]`, *optional*):
            The names that `image`, `expression`, `box` and `absent` have in your file. Only for `"custom"`.
        absent_per_image (`int`, *optional*):
            Number of expressions to add to each image that name nothing in it, from which the scores of a model learn.
            For `"shapes"` (1 to 8) they describe no object of their scene. For other data they are expressions of the
            other images, see [`~absent_expressions.add_absent_expressions`]; their rows come last, and there is no
            streaming.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset` with the columns
        - **image** -- the image, decoded to `PIL.Image.Image` when the row is read.
        - **image_id** (`str`) -- the same for all expressions of one image.
        - **expression** (`str`) -- the text that describes the object to find.
        - **box** (`list[float]`) -- `[xmin, ymin, xmax, ymax]` in pixels of the image in this row, 0-based and
          half-open: the whole image is `[0, 0, width, height]`. `None` for a row of `"custom"` data without box.
        - **absent** (`bool`) -- for `"grefcoco"`, for `"custom"` data that says it, and with `absent_per_image`:
          whether the expression is known to name nothing in the image. Then `box` is `None`.

        and further columns that depend on the benchmark. For the RefCOCO family and ReferItGame, as far as the source
        has them
        - **ref_id** (`str`), **ann_id** (`str`), **sent_id** (`str`) -- ids of the reference, object and sentence.

        For `"grefcoco"`
        - **ref_id** (`str`), **sent_id** (`str`) -- as above.
        - **ann_ids** (`list[str]`), **num_boxes** (`int`) -- the ids and the number of the objects that the expression
          names together; `box` is the smallest box around them.

        For `"flickr30k_entities"`
        - **sentence** (`str`), **sentence_id** (`int`) -- the sentence that the phrase is from, one of 0 to 4.
        - **chain_id** (`str`) -- the entity that the phrase means; phrases of several sentences may share it.
        - **phrase_types** (`list[str]`) -- such as `["people"]`.
        - **num_boxes** (`int`) -- the number of annotated boxes; `box` is the smallest box around them.

        For `"shapes"`
        - **kind** (`str`) -- what singles the object out, such as `"attribute"` or `"relation"`.
        - **objects** (`list[dict]`) -- every object of the scene.

        For `"custom"`
        - **source_row** (`str`) -- the line of your file, or the id of the COCO annotation.

    Raises:
        `ValueError`: A name, split or other argument is not valid for the benchmark, or a file has invalid content.
        `FileNotFoundError`: Files of the benchmark are missing.
        `ImportError`: `datasets` is not installed.

    Example:

    ```python
    >>> from epmvg_hf import load_grounding_dataset

    >>> dataset = load_grounding_dataset("shapes", split="validation", num_images=10)
    >>> row = dataset[0]
    >>> row["expression"], row["box"]
    ('third diamond from the left', [59.0, 97.0, 87.0, 125.0])
    >>> row["image"].crop(row["box"]).size
    (28, 28)
    >>> load_grounding_dataset("refcoco", data_dir="refer/data", split="testA").column_names
    ['image', 'image_id', 'expression', 'box', 'ref_id', 'ann_id', 'sent_id']
    ```
    """
    with needs_extra("Loading a dataset", "train"):
        import datasets  # noqa: F401

    if isinstance(exclude, os.PathLike):
        exclude = Path(exclude).read_text(encoding="utf-8").split()
    exclude = frozenset(str(image_id) for image_id in exclude)

    # Arguments that only apply to some of the names, `None` where they are left at their default.
    for_shapes = {"seed": seed or None, "num_images": num_images}
    for_custom = {"box_format": box_format, "columns": columns}
    for_benchmarks = {"split_by": split_by, "source": source, "boxes": None if boxes == "union" else boxes}

    if name == "shapes":
        for_files = {
            "data_dir": data_dir,
            "missing_images": None if missing_images == "error" else missing_images,
            "errors": None if errors == "raise" else errors,
            "exclude": exclude or None,
            "image_dir": image_dir,
        }
        _refuse(name, "seed and num_images", **for_files, **for_custom, **for_benchmarks)
        from .shapes import load_shapes

        return load_shapes(full_split_name(split), seed, num_images, streaming, num_proc, cache_dir, absent_per_image)

    from .absent_expressions import add_absent_expressions
    from .builder import open_source

    if streaming and absent_per_image is not None:
        raise ValueError("absent_per_image needs streaming=False: absent expressions are those of other images.")
    reader: GroundingSource
    images = None if image_dir is None else _find_folder(image_dir, name, "image_dir")
    if name == "custom":
        _refuse(name, "data_dir, image_dir, box_format and columns", **for_shapes, **for_benchmarks)
        from .readers.custom import CustomData

        reader = CustomData(_find_folder(data_dir, name), split, images, box_format, columns)
    else:
        benchmark, implied = resolve_name(name)
        _refuse(name, "data_dir, split_by, image_dir and source", **for_shapes, **for_custom)
        if split_by not in (None, implied) and implied is not None:
            raise ValueError(f"name {name!r} means the split by {implied}, but split_by is {split_by!r}.")
        folder = _find_folder(data_dir, name)
        request = SplitRequest.resolve(benchmark, folder, split, split_by or implied, images, boxes, cache_dir)
        reader = find_reader(request, source)
    dataset = open_source(reader, missing_images, errors, exclude, streaming, num_proc, cache_dir)
    return dataset if absent_per_image is None else add_absent_expressions(dataset, absent_per_image)


def find_reader(request: SplitRequest, source: str | None = None) -> "GroundingSource":
    """
    Finds the reader of one split: the one for the first kind of files that is in the data folder, or for the kind that
    `source` names.

    Raises:
        `FileNotFoundError`: None of the files is there; the message lists what was looked for.
        `ValueError`: The benchmark has no such kind of files.
    """
    readers = readers_of(request.benchmark)
    if source is not None and source not in readers:
        raise ValueError(f"source of {request.benchmark.title} must be one of {', '.join(readers)}, not {source!r}.")
    chosen = list(readers.values()) if source is None else [readers[source]]
    for reader in chosen:
        if (found := reader.find(request)) is not None:
            return found
    places = "; or ".join(reader.looks_for(request) for reader in chosen)
    raise FileNotFoundError(
        f"no files of the {request.split} split of {request.benchmark.title} in {request.data_dir}, expected {places}."
    )


def readers_of(benchmark: Benchmark) -> dict[str, type["GroundingSource"]]:
    """The reader for each kind of files that a benchmark comes in, in the order in which the kinds are looked for."""
    from .readers.flickr30k_entities import Flickr30kEntities
    from .readers.hub_parquet import HubParquet
    from .readers.refer_api import ReferFiles
    from .readers.referitgame import ReferItJson
    from .readers.transvg_index import IndexFile

    if benchmark.name == "referitgame":
        return {"official": ReferItJson, "refer": ReferFiles, "index": IndexFile}
    if benchmark.name == "flickr30k_entities":
        return {"official": Flickr30kEntities, "index": IndexFile}
    if benchmark.name == "grefcoco":
        return {"refer": ReferFiles}
    return {"refer": ReferFiles, "index": IndexFile, "parquet": HubParquet}


def _find_folder(path: str | os.PathLike | None, name: str, argument: str = "data_dir") -> Path:
    if path is None:
        raise ValueError(f'{argument} is needed for "{name}": the folder with its annotations and images.')
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument} {folder} is not a folder.")
    return folder


def _refuse(name: str, valid: str, **arguments: object) -> None:
    """Raises a `ValueError` for the first argument that was given although this benchmark has no use for it."""
    for argument, value in arguments.items():
        if value is not None:
            raise ValueError(f'{argument} does not apply to "{name}"; its own arguments are {valid}.')
