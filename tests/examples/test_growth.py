"""The benchmark of growth: what it fits and measures, on curves and actions whose answers are known."""

import growing_training
import growth
import numpy as np
import projection
import pytest
import torch
from growing_training import Point


@pytest.mark.parametrize("power", [1, 2])
def test_the_exponent_is_that_of_the_large_sizes(power):
    points = [Point("rows", size, "x", 0.05 + 1e-6 * size**power) for size in (100, 1_000, 100_000, 1_000_000)]
    assert growth.exponent(points) == pytest.approx(power, abs=0.35)
    assert growth.exponent(points[2:]) == pytest.approx(growth.exponent(points))


def test_a_quadratic_start_is_reported():
    points = [Point("rows", rows, "start, to the first batch", 1e-10 * rows**2) for rows in growing_training.ROWS]
    grows, starts = growth.check_rows(points)
    assert grows.measured == pytest.approx(2) and not grows.holds
    assert starts.measured == pytest.approx(100) and not starts.holds


def test_the_slope_is_not_moved_by_a_jump():
    step = np.arange(10)
    memory = 3 * step + 1_000 * (step == 9)
    assert growing_training.slope(step, memory) == 3


def test_peak_memory_counts_what_was_freed_again():
    def action() -> torch.Tensor:
        torch.zeros(500_000)
        first = torch.zeros(1_000_000)
        return torch.zeros(250_000) + first[0]

    assert growth.peak_memory(action, torch.device("cpu")) == pytest.approx(4 + 1 + 1, rel=0.01)


def test_the_projection_to_more_gpus_and_more_expressions():
    counts = {
        "GFLOP forward and backward, a picture": 90.0,
        "GFLOP forward and backward, an expression": 10.0,
        "GFLOP of the teacher, a picture": 40.0,
        "GFLOP of the teacher, an expression": 10.0,
        "million parameters": 100.0,
    }
    few = projection.project(counts, gpus=8, expressions=1)
    operations = 64 * 100e9 / (989e12 * 0.3)  # seconds a step
    steps = 1e9 / (8 * 64)
    assert few["operations (ms)"] == pytest.approx(1e3 * operations)
    assert few["all-reduce (ms)"] == pytest.approx(1e3 * 2 * 7 / 8 * 0.4 / 100) and few["of it not hidden (ms)"] == 0
    assert few["hours, cached teacher"] == pytest.approx(steps * operations / 3600)
    assert few["hours, teacher in every step"] == pytest.approx(1.5 * steps * operations / 3600)
    assert few["pictures a second"] == pytest.approx(8 * 64 / (1.5 * operations))

    many = projection.project(counts, gpus=64, expressions=8)
    waiting = 2 * 63 / 64 * 0.4 / 25 - 1.7 * operations * 2 / 3
    assert many["of it not hidden (ms)"] == pytest.approx(1e3 * waiting) and waiting > 0
    assert many["hours, cached teacher"] == pytest.approx(steps / 8 / 8 * (1.7 * operations + waiting) / 3600)


def test_sizes_and_steps_are_measured_and_drawn(tmp_path):
    sizes = growth.measure_inputs(torch.device("cpu"), quick=True)
    assert {point.axis for point in sizes} == set(growth.AXES)
    assert all(point.seconds > 0 and point.megabytes > 0 for point in sizes)
    steps, slopes = growing_training.measure_leak(tmp_path, quick=True)
    assert [point.size for point in steps] == [5, 10, 15, 20] and len(slopes) == 2
    growth.draw(tmp_path / "growth.png", [*sizes, *steps])
    assert (tmp_path / "growth.png").stat().st_size > 10_000
