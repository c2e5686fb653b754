"""The numbers of pictures against a comparison of all pairs of rows."""

import io
import random

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage

from epmvg_hf.data.pictures import number_pictures


def make_rows(images: list[dict | None], ids: list | None) -> Dataset:
    columns = {"image": images} if ids is None else {"image": images, "image_id": ids}
    features = {"image": Image(), "image_id": Value("string")}
    return Dataset.from_dict(columns, Features({name: features[name] for name in columns}))


def compare_all_pairs(images: list[dict | None], ids: list) -> list[int]:
    """Each row's picture, numbered by first appearance, from a comparison with each row before it."""
    seen: list[tuple] = []
    numbers = []
    for image, image_id in zip(images, ids, strict=True):
        content = None if image is None else image["bytes"] if image["bytes"] is not None else image["path"]
        key = (image_id, type(content), content)
        if key not in seen:
            seen.append(key)
        numbers.append(seen.index(key))
    return numbers


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_rows_share_a_picture_where_id_and_file_agree(seed, with_ids):
    rng = random.Random(seed)
    files = [
        *({"bytes": content, "path": path} for content in (b"", b"a", b"bb", b"cc") for path in (None, "a.png")),
        *({"bytes": None, "path": path} for path in ("a.png", "a", "bb")),
        None,
    ]
    images = [rng.choice(files) for _ in range(300)]
    ids = [rng.choice(["1", "2", None]) if with_ids else None for _ in images]
    dataset = make_rows(images, ids if with_ids else None)
    assert number_pictures(dataset).tolist() == compare_all_pairs(images, ids)

    order = [rng.randrange(300) for _ in range(200)]  # some rows several times, others not at all
    selected = compare_all_pairs([images[row] for row in order], [ids[row] for row in order])
    assert number_pictures(dataset.select(order)).tolist() == selected

    parts = [dataset.select(range(100)), dataset.select([5, 250, 3]), dataset]
    rows = [*range(100), 5, 250, 3, *range(300)]
    joined = compare_all_pairs([images[row] for row in rows], [ids[row] for row in rows])
    assert number_pictures(concatenate_datasets(parts)).tolist() == joined


def test_files_of_one_length_that_differ_in_one_pixel():
    pictures = []
    for level in (0, 1, 0):
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[20, 20] = level
        file = io.BytesIO()
        PILImage.fromarray(pixels).save(file, "BMP")
        pictures.append({"bytes": file.getvalue(), "path": None})
    assert len({len(picture["bytes"]) for picture in pictures}) == 1
    assert number_pictures(make_rows(pictures, ["1"] * 3)).tolist() == [0, 1, 0]


def test_no_rows():
    assert number_pictures(make_rows([], [])).tolist() == []
