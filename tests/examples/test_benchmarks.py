"""The benchmarks: one command, its report, and what the rivals and the measurements are."""

import json
import time

import memory
import pytest
import rivals
import run
import timing
import torch
from contenders import TRANSVG, make_contenders
from torch import nn

CPU = torch.device("cpu")


def test_a_quick_run_reports_speed_and_writes_profiles(tmp_path, capsys):
    run.main(["--quick", "--profile", "--precision", "float32", "--output", str(tmp_path)])
    assert capsys.readouterr().out.strip().endswith((tmp_path / "benchmarks.md").read_text().strip())
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report["about"]["precision of speed"] == "float32"
    *rows, product = [row for row in report["parts"]["speed"] if "training step" not in row][:-1]
    by_case = {(row["inference"], row["expressions"]): row for row in rows}
    assert list(by_case) == [(c.name, k) for c in make_contenders(quick=True) for k in c.inference]
    assert product["GFLOP/s"] > 0
    one, two, transvg = by_case["student", 1], by_case["student", 2], by_case[TRANSVG, 2]
    # One picture for both of the student's expressions, and one for each of TransVG's.
    assert (two["pictures"], transvg["pictures"]) == ("1 of 128 x 128", "2 of 128 x 128")
    assert one["GFLOP"] < two["GFLOP"] < 2 * one["GFLOP"] and transvg["of TransVG's"] == 1
    assert two["of TransVG's"] == pytest.approx(two["ms"] / transvg["ms"])
    for row in rows:
        assert row["ms an expression"] * row["expressions/s"] == pytest.approx(1000)
        assert row["peak MB"] > 0 and row["times its floor"] > 0

    training = [row for row in report["parts"]["speed"] if "training step" in row]
    assert [(row["training step"], row["expressions"]) for row in training] == [("student", 2), (TRANSVG, 2)]
    assert training[0]["GFLOP"] > 2 * two["GFLOP"]  # a backward pass takes twice the operations of a forward pass
    assert "convolution" in (tmp_path / "profile-inference-student-optimized-2.txt").read_text()
    assert "Backward" in (tmp_path / "profile-training-step-student-2.txt").read_text()


def test_the_other_parts_have_tables_of_their_own(tmp_path):
    run.main(
        ["--quick", "--parts", "latency", "grouping", "distillation", "--repeats", "2", "--output", str(tmp_path)]
    )
    parts = json.loads((tmp_path / "benchmarks.json").read_text())["parts"]
    assert list(parts) == ["latency", "grouping", "distillation"]
    assert [row["expressions"] for row in parts["latency"]] == [1, 8] and all(
        row["ms"] > 0 for row in parts["latency"]
    )
    grouped, pairs = parts["grouping"]
    assert grouped["largest difference of a box"] < 1e-4 and pairs["of that of pairs"] == 1
    assert [row["teacher"] for row in parts["distillation"]] == ["on the fly", "cached", "no teacher"]
    assert "## grouping" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "precision"], "the part precision needs a trained model, such as --model outputs/demo"),
        (["--repeats", "0"], "--repeats is 0, expected at least 1"),
    ],
)
def test_a_command_that_cannot_run_says_why(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_rows_with_other_columns_begin_a_new_table():
    parts = {"a part": [{"x": 1.23456, "y": None}, {"x": 12345.6, "y": 20000}, {"z": "text"}]}
    assert run.as_markdown({"threads": "1"}, parts) == (
        "# Benchmarks\n\n* threads: 1\n\n## a part\n\n| x | y |\n| --- | --- |\n| 1.23 |  |\n| 12,346 | 20,000 |\n"
        "\n| z |\n| --- |\n| text |\n"
    )


def test_the_equivalent_of_transvg_has_its_size_and_does_not_see_padding():
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in rivals.make_transvg(quick=False).parameters())
    assert parameters == pytest.approx(149.5e6, rel=0.01)  # TransVG's paper says 149.5 million with a ResNet-50

    model = rivals.make_transvg(quick=True).eval()
    inputs = next(c for c in make_contenders(quick=True) if c.name == TRANSVG).make_inputs(2)
    boxes = model(**inputs)["pred_boxes"]
    assert boxes.shape == (2, 4) and ((boxes > 0) & (boxes < 1)).all()
    words, padded = inputs["attention_mask"].bool(), inputs["input_ids"].clone()
    padded[~words] = 7
    torch.testing.assert_close(model(**{**inputs, "input_ids": padded})["pred_boxes"], boxes)
    torch.testing.assert_close(rivals.loss_of(boxes, boxes), torch.tensor(0.0))


def test_peak_memory_counts_what_was_freed_again():
    assert memory.peak_megabytes(TakesMemory, CPU) == pytest.approx(40, abs=4)


class TakesMemory:
    """An action that keeps 10 MB and takes 30 MB for a moment; making it takes 200 MB for a moment."""

    def __init__(self):
        torch.zeros(50_000_000)
        self.kept = torch.zeros(2_500_000)

    def __call__(self):
        torch.zeros(7_500_000)


def test_actions_take_turns_and_the_median_counts():
    order, naps = [], iter([0.0, 0.05, 0.0])
    actions = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(next(naps)))}
    seconds = timing.take_turns(actions, CPU, repeats=3)
    assert order == ["a", "b"] * 3 and seconds["b"] < 0.05


def test_operations_of_fused_attention_are_counted():
    query = torch.ones(1, 2, 10, 8)
    counted = timing.count_operations(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
    assert counted == 2 * (2 * 2 * 10 * 10 * 8)  # two products for two heads
