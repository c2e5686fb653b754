import numpy as np
from PIL import Image

from epmvg_hf.evaluation.visualization import draw_grid


def test_grid_shows_images_and_both_boxes(tmp_path):
    path = tmp_path / "grid.png"
    images = [Image.new("RGB", (60, 40), (0, 0, 90)), Image.new("L", (30, 50), 200)]
    boxes, true_boxes = np.array([[5, 5, 50, 30], [2, 2, 20, 40]]), np.array([[8, 8, 52, 36], [1, 1, 25, 45]])
    draw_grid(path, images, ["a dog", "a cat"], boxes, true_boxes)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert ((pixels == [0, 0, 90]).all(-1)).sum() > 1000  # the first image
    assert ((pixels[..., 0] > 200) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)).sum() > 100  # predicted boxes
    assert ((pixels[..., 1] > 200) & (pixels[..., 0] < 60) & (pixels[..., 2] < 60)).sum() > 100  # true boxes


def test_16_bits_and_transparency(tmp_path):
    images = [Image.fromarray(np.full((40, 60), 100 * 257, np.uint16)), Image.new("RGBA", (60, 40), (0, 0, 0, 0))]
    boxes = np.array([[5, 5, 50, 30]] * 2)
    draw_grid(tmp_path / "grid.png", images, ["a dog", "a cat"], boxes)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert (pixels == 100).all(-1).sum() > 1000
    draw_grid(tmp_path / "white.png", images[1:], [""], boxes[1:])
    assert (np.asarray(Image.open(tmp_path / "white.png").convert("L")) < 50).mean() < 0.01  # no black picture
