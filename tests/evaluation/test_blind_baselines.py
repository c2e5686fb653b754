import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import ExifTags, ImageFile
from PIL import Image as PILImage

from epmvg_hf.evaluation.blind_baselines import blind_accuracy


def _dataset(rows: list[tuple[str, list[float]]], size=(100, 50)) -> Dataset:
    columns = {
        "image": [PILImage.new("RGB", size)] * len(rows),
        "image_id": [str(row) for row in range(len(rows))],
        "expression": [expression for expression, _ in rows],
        "box": [box for _, box in rows],
    }
    features = {"image": Image(), "image_id": Value("string"), "expression": Value("string")}
    return Dataset.from_dict(columns, Features({**features, "box": List(Value("float32"), length=4)}))


def test_each_baseline_uses_what_it_may_use():
    sky, dog = [0.0, 0.0, 100.0, 10.0], [40.0, 20.0, 60.0, 50.0]
    train = _dataset([("the sky", sky)] * 8 + [("a brown dog", dog)] * 12)
    # These images are twice as large, but boxes are fitted as fractions of the image.
    test = _dataset(
        [
            ("the sky", [0.0, 0.0, 200.0, 20.0]),  # the same expression
            ("his dog", [80.0, 40.0, 120.0, 100.0]),  # the same last word
            ("zebra", [80.0, 40.0, 120.0, 100.0]),  # an unknown word, so the constant box, which is the dogs'
            ("everything", [0.0, 0.0, 200.0, 100.0]),
        ],
        size=(200, 100),
    )
    assert blind_accuracy(train, test) == {
        "whole_image": 0.25,
        "best_constant_box": 0.5,
        "best_box_per_expression": 0.75,
    }


@pytest.mark.parametrize("none", [None, [float("nan")] * 4], ids=["None", "NaN"])
def test_rows_without_a_box_do_not_count(none):
    rows = [("the sky", [0.0, 0.0, 100.0, 10.0])] * 6 + [("a dog", [40.0, 20.0, 60.0, 50.0])] * 4
    train, test = _dataset(rows), _dataset(rows[3:8])
    more = [("the sky", none)] * 9
    assert blind_accuracy(_dataset(rows + more), _dataset(more + rows[3:8])) == blind_accuracy(train, test)
    with pytest.raises(ValueError, match="none of the 9 rows of the evaluation data has a box, expected at least one"):
        blind_accuracy(train, _dataset(more))
    with pytest.raises(ValueError, match="none of the 9 rows of the training data has a box, expected at least one"):
        blind_accuracy(_dataset(more), test)


@pytest.mark.parametrize("stored", ["bytes", "paths"])
def test_each_row_has_the_size_of_its_own_picture(tmp_path, monkeypatch, stored):
    """Pictures may share an id. Sizes are those after the EXIF orientation, but nothing is decoded."""
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6
    PILImage.new("RGB", (100, 50)).save(tmp_path / "wide.jpg")
    PILImage.new("RGB", (80, 40)).save(tmp_path / "high.jpg", exif=exif)
    files = [tmp_path / name for name in ("wide.jpg", "high.jpg", "wide.jpg", "high.jpg")]
    boxes = [[0.0, 0.0, 100.0, 50.0], [0.0, 0.0, 40.0, 80.0], [0.0, 0.0, 50.0, 50.0], [0.0, 0.0, 40.0, 40.0]]
    images = [str(file) if stored == "paths" else {"bytes": file.read_bytes(), "path": None} for file in files]
    features = _dataset([("thing", boxes[0])]).features
    columns = {"image": images, "image_id": ["1"] * 4, "expression": ["thing"] * 4, "box": boxes}
    dataset = Dataset.from_dict(columns, features)
    monkeypatch.delattr(ImageFile.ImageFile, "load")
    assert blind_accuracy(dataset, dataset, threshold=0.9)["whole_image"] == 0.5
    assert blind_accuracy(dataset, dataset.with_transform(lambda batch: {}), threshold=0.9)["whole_image"] == 0.5


def test_a_row_without_an_image_is_named():
    dataset = _dataset([("thing", [0.0, 0.0, 10.0, 10.0])] * 2)
    missing = Dataset.from_dict({**dataset.to_dict(), "image": [None] * 2}, dataset.features)
    with pytest.raises(ValueError, match="row 0 of the evaluation data has no image, whose size its box needs"):
        blind_accuracy(dataset, missing)


def test_constant_box_is_the_best_of_all_training_boxes():
    rng = np.random.default_rng(0)
    corners = rng.random((60, 2)) * [50, 25]
    boxes = np.concatenate([corners, corners + 5 + rng.random((60, 2)) * [45, 20]], axis=1)
    data = _dataset([("thing", box.tolist()) for box in boxes])

    def accuracy(box) -> float:
        low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
        intersection = (high - low).clip(0).prod(1)
        union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - intersection
        return float((intersection / union >= 0.5).mean())

    best = max(accuracy(box) for box in [*boxes, np.array([0, 0, 100, 50])])
    assert abs(blind_accuracy(data, data)["best_constant_box"] - best) < 1e-9
