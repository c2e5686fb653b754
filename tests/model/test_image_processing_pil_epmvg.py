"""Tests of the PIL backend alone. `test_image_processing_epmvg.py` tests what both backends have in common."""

import numpy as np
from PIL import Image

from epmvg_hf.model.image_processing_pil_epmvg import EpmVGImageProcessorPil


def test_resize_is_that_of_pil():
    noise = np.random.default_rng(0).integers(0, 256, (50, 100, 3), np.uint8)
    processor = EpmVGImageProcessorPil(size=40, do_rescale=False, do_normalize=False)
    pixels = processor(noise, return_tensors="np").pixel_values[0, :, 10:30]
    expected = np.array(Image.fromarray(noise).resize((40, 20), Image.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(pixels, expected)


def test_backend_name():
    assert EpmVGImageProcessorPil().backend == "pil"
