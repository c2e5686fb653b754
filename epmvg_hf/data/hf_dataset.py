"""Any dataset of images, expressions and boxes, as the rows that models are trained on."""

import hashlib
import reprlib
from typing import Any

import datasets

from .annotations import AnnotatedImage, place_rows
from .field_values import (
    BOX_COLUMNS,
    as_written,
    check_absent,
    check_columns,
    check_id,
    list_expressions,
    look_normalised,
    to_xyxy,
)
from .files.image_files import measure_stored
from .image_groups import is_transformed
from .progress import bars_only_on_a_terminal

SAMPLES_AT_ONCE = 64  # in memory, with their images


def as_grounding_dataset(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: dict[str, str | None] | None = None,
    box_format: str = "xyxy",
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Turns any dataset with images, expressions and boxes into rows of image, image_id, expression and box, which is
    what [`EpmVGTrainer`] takes. A stream stays a stream: its rows are made while iterating, and no image is written to
    the disk.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            One split. Its rows have

            - an image: of the feature `datasets.Image`, encoded bytes, or a path;
            - an expression (text), or a list of them, each of which becomes a row;
            - a box, four numbers in pixels, 0-based, of the image as displayed (after its EXIF orientation), or `None`
              or four times NaN for expressions without box; beside a list of expressions also a list of as many boxes;
            - optionally `absent` (`bool`): true says that the expression is known to name nothing in its image, whose
              box is `None` then; beside a list of expressions also a list of as many.
        columns (`dict[str, str]`, *optional*):
            What the dataset calls `image`, `image_id`, `expression`, `box` and `absent`, where the names differ. A
            name with dots looks into a column of objects: in a WebDataset, `{"image": "jpg", "expression":
            "json.expression", "box": "json.box"}`. `{"box": None}` says that there are no boxes, as with captions, and
            `{"absent": None}` that a column of that name means something else.
        box_format (`str`, *optional*, defaults to `"xyxy"`):
            `"xyxy"` (half-open: the whole image is `[0, 0, width, height]`) or `"xywh"` (corner, width and height).

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset` with the columns image (decoded when read), image_id (`str`),
        expression (`str`), box (xyxy float pixels or `None`) and, if the dataset has it, absent (`bool`). If the
        dataset has no column of image ids, image_id is a digest of the image's bytes, or its path where the dataset
        holds paths.

    Raises:
        `ValueError`: An argument is not valid, or a row cannot be used; a stream says so when that row is read. The
            error names the row, counted from 0, and shows the box as it stands there. The workers of a data loader
            each count their own rows.

    Note:
        In a WebDataset, write every number of a box with a decimal point (1.0), or pass `features` to `load_dataset`.
        `datasets` infers the types of JSON from the first samples: if they hold whole numbers only, it cuts a later
        1.5 to 1, and it refuses a box that mixes whole numbers with others. For streams this function corrects the
        inferred type before rows are read; in a prepared dataset the numbers are already cut.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from epmvg_hf import as_grounding_dataset

    >>> own = Dataset.from_dict({"photo": ["scene.png"], "phrase": ["green triangle"], "bbox": [[24, 59, 33, 29]]})
    >>> rows = as_grounding_dataset(own, {"image": "photo", "expression": "phrase", "box": "bbox"}, box_format="xywh")
    >>> rows[0]["image"].size, rows[0]["box"]
    ((113, 128), [24.0, 59.0, 57.0, 88.0])
    ```
    """
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, expected a Dataset or an IterableDataset: one split."
        )
    if box_format not in BOX_COLUMNS:
        raise ValueError(f'box_format must be "xyxy" or "xywh", not {box_format!r}.')
    if is_transformed(dataset):
        raise ValueError(
            "the dataset has a transform (with_transform), which as_grounding_dataset could only apply once and for "
            "all: call as_grounding_dataset first, and with_transform on what it returns."
        )
    features = dataset.features
    present = list(next(iter(dataset), {})) if features is None else list(features)
    names = _find_columns(present, features, columns)
    dataset = dataset.with_format(None)
    settings = {"names": names, "box_format": box_format}
    if isinstance(dataset, datasets.Dataset):
        return _convert_prepared(dataset, settings)
    return _convert_stream(dataset, present, settings)


def _find_columns(
    present: list[str], features: datasets.Features | None, columns: dict[str, str | None] | None
) -> dict[str, str | None]:
    """What the dataset calls each of our columns; `None` for image_id, box or absent where it has none."""
    names: dict[str, str | None] = {"image": "image", "image_id": None, "expression": "expression", "box": "box"}
    names |= {name: name if name in present else None for name in ("image_id", "absent")}
    columns = columns or {}
    check_columns(columns, names)
    names |= columns
    for ours, theirs in names.items():
        if theirs is None and ours in ("image_id", "box", "absent"):
            continue
        if theirs not in present and (ours == "image" or not _has_field(present, features, theirs)):
            raise ValueError(
                f"the dataset has no column {theirs!r} for {ours}, only {', '.join(present)}; columns says what it "
                "calls each of ours."
            )
    feature = None if features is None else features[names["image"]]
    if isinstance(feature, datasets.Value) and not feature.dtype.endswith(("string", "binary")):
        raise ValueError(f"the column {names['image']!r} is {feature.dtype}, expected images, their bytes or paths.")
    return names


def _has_field(present: list[str], features: datasets.Features | None, name: str | None) -> bool:
    """
    Whether there is a field of that name, in which dots lead into objects. Without features, only the column is known.
    """
    if not isinstance(name, str):
        return False
    column, *fields = name.split(".")
    known = features
    for field in (column, *fields):
        if known is None:
            return column in present
        if not isinstance(known, dict) or field not in known:
            return False
        known = known[field]
    return True


def _row_features(names: dict[str, str | None]) -> dict[str, Any]:
    """The features of our columns but the image."""
    text = datasets.Value("string")
    features = {"image_id": text, "expression": text, "box": datasets.List(datasets.Value("float32"), length=4)}
    return features if names["absent"] is None else {**features, "absent": datasets.Value("bool")}


def _convert_prepared(dataset: datasets.Dataset, settings: dict[str, Any]) -> datasets.Dataset:
    """Rows beside the column of images as it is stored. `datasets` copies images only where one has several rows."""
    image = settings["names"]["image"]
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows, expected at least one.")
    images = dataset.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    images = images.cast_column("image", datasets.Image())
    dataset = dataset.cast_column(image, datasets.Image(decode=False))
    with bars_only_on_a_terminal():
        rows = dataset.map(
            _make_rows,
            batched=True,
            batch_size=SAMPLES_AT_ONCE,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=datasets.Features(_row_features(settings["names"]) | {"row": datasets.Value("int64")}),
            fn_kwargs=settings | {"keep": "row"},
        )
    if len(rows) != len(images):
        images = images.select(rows["row"])
    return datasets.concatenate_datasets([images, rows.remove_columns("row")], split=dataset.split, axis=1)


def _convert_stream(
    dataset: datasets.IterableDataset, present: list[str], settings: dict[str, Any]
) -> datasets.IterableDataset:
    """Rows with their images, made while iterating."""
    if dataset.features is not None:
        dataset = dataset.decode(False)
        dataset = dataset.cast(_with_float_boxes(dataset.features, settings["names"]["box"]))
    rows = dataset.map(
        _make_rows,
        batched=True,
        batch_size=SAMPLES_AT_ONCE,
        with_indices=True,
        remove_columns=present,
        fn_kwargs=settings | {"keep": "image"},
    )
    return rows.cast(datasets.Features({"image": datasets.Image(), **_row_features(settings["names"])}))


def _with_float_boxes(features: datasets.Features, name: str | None) -> datasets.Features:
    """The features, with floats in place of inferred integers in boxes: later floats would be cut to integers."""
    if name is None:
        return features
    if name in features:
        return datasets.Features({**features, name: _as_floats(features[name])})
    column, _, rest = name.partition(".")
    return datasets.Features({**features, column: dict(_with_float_boxes(features[column], rest))})


def _as_floats(feature: Any) -> Any:
    """A feature of boxes with floats in place of integers."""
    if isinstance(feature, datasets.Value) and "int" in feature.dtype:
        return datasets.Value("float64")
    if isinstance(feature, datasets.List | datasets.LargeList):
        return datasets.List(_as_floats(feature.feature))
    return feature


def _make_rows(
    batch: dict[str, list], indices: list[int], names: dict[str, str | None], box_format: str, keep: str
) -> dict[str, list]:
    """
    The rows of a batch of samples, for `map`. `keep` says what each row has of its image: "image" itself, or in the
    column "row" the index of its sample.
    """
    rows: dict[str, list] = {name: [] for name in (keep, *_row_features(names))}
    measured: tuple[Any, tuple[int, int] | None] = (None, None)  # the rows of an image usually follow each other
    for position, index in enumerate(indices):
        where = f"row {index}"
        try:
            image, path = _encode_image(batch[str(names["image"])][position])
            where += f" ({path})" if path else ""
            if measured[0] != image:
                measured = (image, measure_stored(image))
            if names["image_id"] is None:
                image_id = _identify(image)
            else:
                image_id = str(check_id(_pick_nested(batch, names["image_id"], position), "image_id"))
            sample = _read_sample(batch, position, names, box_format)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removesuffix('.')}.") from error
        listed = [
            {
                "where": where,
                "expression": expression,
                "box": box,
                "written_box": as_written(box, box_format),
                "absent": absent,
            }
            for expression, box, absent in sample
        ]
        placed, problems = place_rows(AnnotatedImage("its image", image_id, None, listed), measured[1])
        if problems:
            raise ValueError(problems[0])
        for row in placed:
            rows[keep].append(image if keep == "image" else index)
            rows["image_id"].append(image_id)
            for name in rows.keys() - {keep, "image_id"}:
                rows[name].append(row[name])
    if look_normalised(rows["box"]):
        raise ValueError(f"row {indices[0]} and those after it: every box lies within [0, 1], expected pixels.")
    return rows


def _read_sample(
    batch: dict[str, list], position: int, names: dict[str, str | None], box_format: str
) -> list[tuple[str, list[float] | None, bool]]:
    """The expressions of a sample, each with its box and whether it is absent."""
    assert names["expression"] is not None  # for mypy: only image_id and box may be
    value = _pick_nested(batch, names["expression"], position)
    expressions = list_expressions(value)
    box = None if names["box"] is None else _pick_nested(batch, names["box"], position)
    boxes = [box] * len(expressions)
    if isinstance(value, list) and isinstance(box, list) and box and isinstance(box[0], list | None):
        if len(box) != len(expressions):
            raise ValueError(f"{len(box)} boxes, expected one, or one for each of the {len(expressions)} expressions")
        boxes = box
    absent = None if names["absent"] is None else _pick_nested(batch, names["absent"], position)
    flags = absent if isinstance(value, list) and isinstance(absent, list) else [absent] * len(expressions)
    if len(flags) != len(expressions):
        raise ValueError(
            f"absent is {reprlib.repr(flags)}, expected one, or one for each of the {len(expressions)} expressions"
        )
    return [
        (expression, to_xyxy(box, box_format), bool(check_absent(flag)))
        for expression, box, flag in zip(expressions, boxes, flags, strict=True)
    ]


def _pick_nested(batch: dict[str, list], name: str, position: int) -> Any:
    """The value of a sample in a column, or in the field below it that a name with dots leads to."""
    if name in batch:
        return batch[name][position]
    column, *fields = name.split(".")
    value = batch[column][position]
    for field in fields:
        if not isinstance(value, dict) or field not in value:
            raise ValueError(f"no {name!r}")
        value = value[field]
    return value


def _encode_image(value: Any) -> tuple[dict[str, Any], str | None]:
    """An image in the form in which `datasets` stores it, and its path for error messages."""
    try:
        image = value if isinstance(value, dict | None) else datasets.Image().encode_example(value)
    except (AttributeError, TypeError):  # raised by `datasets` for values such as numbers
        raise ValueError(f"the image is {reprlib.repr(value)}, expected an image, its bytes or its path") from None
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if not (content or path):
        raise ValueError("there is no image")
    # A path beside bytes comes from another machine. If it exists here too, `datasets` would read that other file.
    return {"bytes": content, "path": None if content else path}, path


def _identify(image: dict[str, Any]) -> str:
    """An id for an image without one: its path, or else a digest of its bytes."""
    return image["path"] or hashlib.sha256(image["bytes"]).hexdigest()[:32]
