"""What images of more than 8 bits, of other colour spaces and with transparency become on their way to the model."""

import io
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from epmvg_hf import EpmVGDataCollator, GroundingAugmentation, ImageGroups

LEVELS = np.repeat(np.arange(0, 256, 4, np.uint8)[:, None], 64, axis=1)  # 64 x 64, as the canvas, from black to white
COLOURS = np.stack([LEVELS, 255 - LEVELS, np.full_like(LEVELS, 40)], -1)
JITTER = {"flip": 0.0, "crop": 0.0, "color_jitter_probability": 1.0, "min_scale": 1.0}


def encode(image: PILImage.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 100} if kind == "JPEG" else {}))
    return file.getvalue()


def rows_of(content: bytes) -> Dataset:
    row = {"image": {"bytes": content, "path": None}, "image_id": "1", "expression": "the dog", "box": [2, 3, 9, 9]}
    features = {"image": Image(), "image_id": Value("string"), "expression": Value("string")}
    return Dataset.from_list([row], Features({**features, "box": List(Value("float32"), length=4)}))


def icon() -> PILImage.Image:
    return PILImage.merge("LA", [PILImage.new("L", (64, 64)), PILImage.fromarray(255 - LEVELS)])


FILES = {
    "16-bit PNG": (PILImage.fromarray(LEVELS.astype(np.uint16) * 257), "PNG", LEVELS[..., None]),
    "16-bit TIFF": (PILImage.fromarray(LEVELS.astype(np.uint16) * 257), "TIFF", LEVELS[..., None]),
    "float TIFF": (PILImage.fromarray(LEVELS.astype(np.float32) / 255), "TIFF", LEVELS[..., None]),
    "CMYK JPEG": (PILImage.fromarray(COLOURS).convert("CMYK"), "JPEG", COLOURS),
    "gray JPEG": (PILImage.fromarray(LEVELS), "JPEG", LEVELS[..., None]),
    "transparent PNG": (icon(), "PNG", LEVELS[..., None]),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_levels_reach_the_model(processor, kind, augmented, streamed):
    image, file_format, levels = FILES[kind]
    dataset = rows_of(encode(image, file_format))
    examples = list(dataset) if streamed else [ImageGroups(dataset, decoded_side=64)[0]]
    # A jitter of strength 0 converts the image, but changes no colour.
    augmentation = GroundingAugmentation(color_jitter=0.0, **JITTER) if augmented else None
    batch = EpmVGDataCollator(processor, augmentation, as_bytes=True)(examples)
    pixels = batch["pixel_values"][0].permute(1, 2, 0).int()
    expected = torch.from_numpy(np.broadcast_to(levels, (64, 64, 3)).astype(np.int32))
    assert (pixels - expected).abs().max() <= (4 if file_format == "JPEG" else 0)


def test_jitter_changes_16_bits_as_it_changes_8(processor):
    means = []
    for image in (PILImage.fromarray(LEVELS), PILImage.fromarray(LEVELS.astype(np.uint16) * 257)):
        random.seed(0)
        torch.manual_seed(0)
        collator = EpmVGDataCollator(processor, GroundingAugmentation(**JITTER), as_bytes=True)
        means.append(collator([ImageGroups(rows_of(encode(image, "PNG")))[0]])["pixel_values"].float().mean())
    assert means[0] == means[1] and 50 < means[0] < 200


def test_a_crop_does_not_change_what_values_mean():
    """A dark part of 16-bit or float levels, by itself, could be levels of 8 bits or fractions."""
    dark = np.full((80, 80), 0.9, np.float32)
    dark[0, 0] = 200
    augmentation = GroundingAugmentation(flip=0.0, crop=1.0, min_crop=0.1, color_jitter_probability=1.0, min_scale=1.0)
    random.seed(1)
    boxes = np.array([[40, 40, 50, 50]], np.float32)
    image, _, _ = augmentation(PILImage.fromarray(dark), ["dog"], boxes)
    assert image.size != (80, 80) and image.mode == "RGB" and np.asarray(image).max() < 10
