import dataclasses
import math

import numpy as np
import pytest
import torch

from epmvg_hf.model.letterbox import Letterbox


def transvg_geometry(height, width, canvas):
    """Ratio, top, left, height and width as TransVG's `utils/transforms.py` computes them in plain Python."""
    ratio = float(canvas / float(max(height, width)))
    new_height, new_width = round(height * ratio), round(width * ratio)
    free_height, free_width = canvas - new_height, canvas - new_width
    return ratio, round(free_height / 2.0 - 0.1), round(free_width / 2.0 - 0.1), new_height, new_width


@pytest.mark.parametrize("canvas", [64, 127, 640])
def test_place_is_transvg(canvas):
    sizes = [(height, width) for height in range(1, 700, 13) for width in (1, 30, 333, 500, 640, 2000)]
    letterbox = Letterbox.place(sizes, canvas)
    for size, ratio, window in zip(sizes, letterbox.ratio.tolist(), letterbox.windows(), strict=True):
        expected_ratio, top, left, height, width = transvg_geometry(*size, canvas)
        assert ratio == expected_ratio
        if min(height, width) > 0:  # TransVG fails if a side rounds to 0, but here the side keeps one pixel
            assert window == (top, left, height, width)
        assert min(window[2:]) >= 1


def test_place_rounds_half_to_even():
    # 5 * 0.5 = 2.5 -> 2 and 7 * 0.5 = 3.5 -> 4, as Python's round
    assert [window[2] for window in Letterbox.place([(5, 20), (7, 20)], 10).windows()] == [2, 4]


@pytest.mark.parametrize("pad_offset", [0.0, 0.3, 0.5, 1.0])
def test_pad_offset(pad_offset):
    (window,) = Letterbox.place([(30, 60)], 61, pad_offset).windows()
    height = round(30 * 61 / 60)
    assert window == (math.floor((61 - height) * pad_offset), 0, height, 61)


def test_placements():
    windows = Letterbox.place([(30, 60), (60, 30)], 64, placements=[(40, 1.0, 0.25), (64, 0.0, 1.0)]).windows()
    assert list(windows) == [(44, 6, 20, 40), (0, 32, 64, 32)]


def test_without_resize():
    letterbox = Letterbox.place([(3, 5)], 8, do_resize=False)
    assert list(letterbox.windows()) == [(2, 1, 3, 5)]
    assert letterbox.ratio.tolist() == [1.0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_round_trip(dtype, tolerance):
    letterbox = Letterbox.place([(480, 640), (640, 427), (3, 5), (30, 2000)], 640, 0.3)
    boxes = torch.tensor(
        [[0.5, 1.25, 639.75, 480], [0, 0, 427, 640], [1, 0.5, 2.5, 3], [1990.5, 2, 2000, 29.5]], dtype=dtype
    )
    labels = letterbox.to_labels(boxes)
    assert labels.dtype == dtype
    assert (letterbox.to_pixels(labels) - boxes).abs().max() < tolerance


@pytest.mark.parametrize(
    "options",
    [{}, {"pad_offset": 0.3}, {"placements": [(33, 1.0, 0.25), (64, 0.0, 1.0), (1, 0.5, 0.5)]}, {"do_resize": False}],
)
def test_a_letterbox_travels_as_whole_numbers(options):
    sizes = [(7, 60), (61, 30), (63, 2)]
    letterbox = Letterbox.place(sizes, 64, **options)
    written = letterbox.to_tensor()
    assert written.dtype == torch.int64
    read = Letterbox.from_tensor(written, torch.tensor(sizes))
    for field in dataclasses.fields(Letterbox):
        expected, found = getattr(letterbox, field.name), getattr(read, field.name)
        assert found == expected if field.name == "canvas" else torch.equal(found, expected), field.name


def test_the_tensor_is_the_longer_side_the_offsets_and_the_canvas():
    assert Letterbox.place([(30, 60)], 64, placements=[(40, 1.0, 0.25)]).to_tensor().tolist() == [[40, 44, 6, 64]]


def test_errors_of_a_tensor_that_is_no_letterbox():
    written = Letterbox.place([(10, 20), (20, 10)], 40).to_tensor()
    with pytest.raises(ValueError, match=r"shape \(B, 4\) .* \(B, 2\), but they have \(2, 4\) and \(1, 2\)"):
        Letterbox.from_tensor(written, torch.tensor([[10, 20]]))
    with pytest.raises(ValueError, match=r"share one canvas side, but `letterbox` has \[40, 80\]"):
        Letterbox.from_tensor(written * torch.tensor([[1], [2]]), torch.tensor([[10, 20], [20, 10]]))


def test_select():
    letterbox = Letterbox.place([(10, 20), (20, 10)], 40)
    selected = letterbox.select(torch.tensor([1, 0, 1]))
    assert selected.top.tolist() == [0, 10, 0]
    assert selected.image_width.tolist() == [10, 20, 10]
    assert selected.canvas == 40


def test_maps_whose_cells_fit_the_picture_are_cut_out():
    letterbox = Letterbox.place([(40, 80), (64, 64)], 64)
    maps, mask = torch.rand(2, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 2:6] = mask[1] = True
    maps[0, :2] = float("nan")  # padding is not read
    wide, square = letterbox.to_picture_maps(maps, mask)
    torch.testing.assert_close(wide, maps[0, 2:6])
    torch.testing.assert_close(square, maps[1])


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (640, 100), (3, 2000)])
def test_the_cells_of_a_map_lie_at_their_parts_of_the_picture(size):
    # A map that says where each of its cells lies on the canvas must say the same where the picture is.
    letterbox = Letterbox.place([size], 320, pad_offset=0.3)
    ((top, left, height, width),) = letterbox.windows()
    y, x = torch.meshgrid(*[torch.arange(20) * 16.0 + 8] * 2, indexing="ij")
    mask = (y + 8 > top) & (y - 8 < top + height) & (x + 8 > left) & (x - 8 < left + width)
    for values, begin, length, axis in ((y, top, height, 0), (x, left, width, 1)):
        (found,) = letterbox.to_picture_maps(values[None], mask[None])
        count = found.shape[axis]
        assert count == max(1, round(length / 16))
        expected = begin + (torch.arange(count) + 0.5) / count * length
        # Beyond the centre of the outermost cell there is nothing to interpolate with.
        expected = expected.clamp(values[mask].min(), values[mask].max())
        torch.testing.assert_close(found.mean(dim=1 - axis), expected, atol=1e-3, rtol=0)


def test_labels_are_not_clipped_but_pixels_are():
    letterbox = Letterbox.place([(10, 20)], 20)
    labels = letterbox.to_labels(torch.tensor([[-1.0, 0, 21, 10]]))
    torch.testing.assert_close(labels, torch.tensor([[0.5, 0.5, 1.1, 0.5]]))
    assert letterbox.to_pixels(labels).tolist() == [[0, 0, 20, 10]]
    outside = letterbox.to_pixels(torch.tensor([[0.5, 0.05, 0.1, 0.1]]))  # in the padding above the picture
    assert outside[0, [1, 3]].tolist() == [0, 0]


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ([(4, 4), (0, 4)], {}, "Image 1 has no pixels: its size is 0 x 4"),
        ([(9, 4)], {"do_resize": False}, "fit the canvas of 8 x 8, but image 0 has 9 x 4"),
        ([(4, 4)], {"do_resize": False, "placements": [(8, 0.0, 0.0)]}, "need do_resize=True"),
        ([(4, 4)], {"placements": []}, "one item for each image: got 0 for 1"),
        ([(4, 4)], {"placements": [(9, 0.0, 0.0)]}, r"Placement 0 is .* from 1 to 8, and two shares from 0 to 1"),
        ([(4, 4)], {"placements": [(8, 0.0, 1.5)]}, "Placement 0 is"),
        ([(4, 4)], {"placements": [(7.5, 0.0, 0.0)]}, "Placement 0 is .* a whole number of pixels"),
        ([(4, 4)], {"placements": np.full((1, 3), np.nan)}, "Placement 0 is .* a whole number of pixels"),
        ([(4, 4)], {"placements": torch.zeros(2, 3)}, "one item for each image: got 2 for 1"),
        ([(4, 4)], {"placements": torch.zeros(1, 2)}, r"three numbers for each image, .* are of shape \(1, 2\)"),
        ([(4, 4)], {"placements": 8}, r"three numbers for each image, .* are of shape \(\)"),
        ([(4, 4)], {"placements": [None]}, r"three numbers for each image, .* are of shape \(1,\)"),
        ([(4, 4)] * 2, {"placements": [(8, 0.0), (8, 0.0, 0.0)]}, r"three numbers for each image, .* \[\(8, 0\.0\),"),
        (
            [(4, 4)],
            {"placements": [("left", 0.0, 0.0)]},
            r"three numbers for each image, .* \[\('left', 0\.0, 0\.0\)\]",
        ),
    ],
)
def test_errors(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        Letterbox.place(sizes, 8, **options)
