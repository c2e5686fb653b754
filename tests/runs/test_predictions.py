import numpy as np
from datasets import Dataset

from epmvg_hf import load_grounding_dataset
from epmvg_hf.evaluation.accuracy import find_boxes
from epmvg_hf.evaluation.accuracy_by_group import GroupAccuracy
from epmvg_hf.runs import predictions
from epmvg_hf.runs.predictions import accuracy_by_kind, draw_some


def test_accuracy_by_kind_starts_with_the_worst_and_leaves_out_rows_without_a_box():
    box, other = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]
    rows = [("size", box, box), ("relation", box, other), ("relation", box, box), ("size", None, other)]
    kinds, true_boxes, predictions = map(list, zip(*rows, strict=True))
    dataset = Dataset.from_dict({"kind": kinds, "box": true_boxes})
    expected = [GroupAccuracy("relation", 2, 0.5), GroupAccuracy("size", 1, 1.0)]
    assert accuracy_by_kind(dataset, np.array(predictions)) == expected
    assert accuracy_by_kind(dataset.remove_columns("kind"), np.array(predictions)) == []


def test_pictures_show_expressions_with_a_box(tmp_path, monkeypatch):
    dataset = load_grounding_dataset("shapes", split="test", num_images=4, absent_per_image=2)
    drawn = []
    monkeypatch.setattr(predictions, "draw_grid", lambda file, **parts: drawn.append(parts))
    boxes, _ = find_boxes(dataset["box"][:], "test data")
    draw_some(tmp_path / "some.png", dataset, np.zeros_like(boxes), boxes, count=100)
    with_box = [row["expression"] for row in dataset if row["box"] is not None]
    assert drawn[0]["expressions"] == with_box and len(with_box) == len(dataset) - 8
    draw_some(tmp_path / "fewer.png", dataset, np.zeros_like(boxes), boxes, count=3)
    assert drawn[1]["expressions"] == [with_box[row] for row in (0, (len(with_box) - 1) // 2, -1)]
