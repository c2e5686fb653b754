from epmvg_hf.runs.evaluation_table import make_table

RESULT = {
    "benchmark": "refcoco",
    "split": "testA",
    "expressions": 5657,
    "images": 750,
    "acc@0.5": 0.7512,
    "acc@0.5_interval": [0.74, 0.7634],
    "mean_iou": 0.6789,
    "expressions_per_second": 123.4,
    "groups": {"num_boxes": [{"name": "1", "count": 5657, "accuracy": 0.7512}]},
}


def test_a_row_for_each_split_and_each_group():
    scores = {"calibration_error": 0.0312, "presence_auroc": 0.9}
    lines = make_table([RESULT, {**RESULT, "split": "testB", "groups": {}, "scores": scores}]).splitlines()
    assert lines[2] == "| refcoco | testA | 5,657 | 750 | 75.12 (74.00 to 76.34) |  | 0.679 |  |  | 123 |"
    assert lines[3].endswith("| 0.679 | 0.031 | 0.900 | 123 |")
    assert lines[-1] == "| refcoco | testA | num boxes | 1 | 5,657 | 75.12 |"


def test_both_protocols():
    result = {**RESULT, "any_box_acc@0.5": 0.5, "any_box_acc@0.5_interval": [0.4, 0.6]}
    assert "| 50.00 (40.00 to 60.00) | 0.679 |" in make_table([result])
