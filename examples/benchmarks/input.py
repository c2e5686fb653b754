#!/usr/bin/env python
"""Pictures a second and core of the input pipeline, against one of PIL and torchvision as TransVG has it.

python examples/benchmarks/input.py                          # pictures of noise as smooth as photos
python examples/benchmarks/input.py --images FOLDER          # JPEGs of your own, as they are

Both read JPEG files and make batches of 640 x 640 pixels for a model. Times are those of the processor, not of the
clock, so that other programs disturb them less. "sent" adds what a worker of a data loader pays to hand its batch to
the training process: it copies the batch into shared memory. "levels off" is the mean difference of 255 levels to the
pixels of the evaluation: large JPEGs are decoded at a lower resolution for training, see `ImageGroups`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from epmvg_hf import EpmVGImageProcessor, ImageGroups

CANVAS = 640
BATCH = 8
SIZES = ((500, 375), (640, 480), (1024, 768), (2000, 1500), (4000, 3000))
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def transvg(paths: list[Path]) -> dict[str, torch.Tensor]:
    """The evaluation transform of TransVG (djiajunustc/TransVG, datasets/transforms.py), and a stacked batch."""
    pictures, masks = [], []
    for path in paths:
        image = Image.open(path).convert("RGB")
        height, width = (round(side * CANVAS / max(image.size)) for side in (image.height, image.width))
        picture = functional.to_tensor(functional.resize(image, [height, width]))
        picture = functional.normalize(picture, MEAN, STD)
        top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
        padded, mask = torch.zeros(3, CANVAS, CANVAS), torch.ones(CANVAS, CANVAS, dtype=torch.int64)
        padded[:, top : top + height, left : left + width] = picture
        mask[top : top + height, left : left + width] = 0
        pictures.append(padded)
        masks.append(mask)
    return {"pixel_values": torch.stack(pictures), "pixel_mask": torch.stack(masks)}


def ours(
    groups: ImageGroups, image_processor: EpmVGImageProcessor, as_bytes: bool = False
) -> Callable[[], dict[str, torch.Tensor]]:
    """The images of a dataset as the trainer reads them, without their expressions."""

    def make_batch() -> dict[str, torch.Tensor]:
        images = [groups[index].image for index in range(len(groups))]
        return dict(image_processor(images, as_bytes=as_bytes, return_tensors="pt"))

    return make_batch


def draw_pictures(folder: Path, size: tuple[int, int]) -> list[Path]:
    """JPEGs of random colours, in which coarse structures are stronger than fine ones, as in photos."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(BATCH):
        pixels = np.zeros((size[1], size[0], 3))
        for side in (4, 16, 64, 256, max(size)):
            noise = rng.integers(0, 256, (side, side, 3), np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)) / side**0.4
        paths.append(folder / f"{size[0]}_{number}.jpg")
        pixels -= pixels.min()
        Image.fromarray((pixels * (255 / pixels.max())).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def measure_pictures(paths: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Rows of a table for the JPEGs of one batch: medians over rounds, in each of which every pipeline runs."""
    columns = {"image": [str(path) for path in paths], "image_id": [path.name for path in paths]}
    dataset = datasets.Dataset.from_dict({**columns, "expression": ["it"] * len(paths)})
    dataset = dataset.cast_column("image", datasets.Image())
    image_processor = EpmVGImageProcessor(size={"height": CANVAS, "width": CANVAS})
    whole, reduced = ImageGroups(dataset), ImageGroups(dataset, decoded_side=round(1.5 * CANVAS))
    pipelines: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "TransVG's": lambda: transvg(paths),
        "evaluation": ours(whole, image_processor),
        "evaluation, bytes": ours(whole, image_processor, as_bytes=True),
        "augmented training, bytes": ours(reduced, image_processor, as_bytes=True),
    }
    made: dict[str, list[float]] = {name: [] for name in pipelines}
    sent: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds):
        for name, make_batch in pipelines.items():
            make_batch()  # brings the memory that it needs, as the batch before does in a training
            for _ in range(3):
                started = time.process_time()
                batch = make_batch()
                made[name].append((time.process_time() - started) / len(paths))
            for values in batch.values():
                values.share_memory_()
            sent[name].append((time.process_time() - started) / len(paths))
    finished = [
        image_processor.from_bytes(pipelines[name]())["pixel_values"]
        for name in ("evaluation, bytes", "augmented training, bytes")
    ]
    difference = (finished[0] - finished[1]).abs() * torch.tensor(STD)[:, None, None] * 255
    covered = pipelines["evaluation"]()["pixel_mask"][:, None].float().mean()
    with Image.open(paths[0]) as image:
        size = f"{image.width}x{image.height}"
    rows = []
    for name in pipelines:
        row: dict[str, Any] = {"picture": size, "pipeline": name}
        for key, seconds in (("made", made), ("sent", sent)):
            median = statistics.median(seconds[name])
            row |= {f"{key}, ms": 1000 * median, f"{key}, pictures/s": 1 / median}
            row[f"{key}, times TransVG's"] = statistics.median(seconds["TransVG's"]) / median
        row["levels off"] = float(difference.mean() / covered) if name == "augmented training, bytes" else 0.0
        rows.append(row)
    return rows


def measure(quick: bool = False, images: Path | None = None) -> list[dict[str, Any]]:
    """
    Measures the input pipeline on one thread of the CPU.

    Args:
        quick (`bool`, *optional*, defaults to `False`): whether to see only that everything runs.
        images (`Path`, *optional*): a folder with JPEGs, of which the first 8 are taken instead of drawn pictures.

    Returns:
        `list[dict]`: a row for each size of pictures and each pipeline.
    """
    threads, rounds = torch.get_num_threads(), 1 if quick else 5
    torch.set_num_threads(1)
    try:
        if images is not None:
            return measure_pictures(sorted(images.glob("*.jpg"))[:BATCH], rounds)
        with tempfile.TemporaryDirectory() as folder:
            sizes = SIZES[:1] if quick else SIZES
            return [row for size in sizes for row in measure_pictures(draw_pictures(Path(folder), size), rounds)]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with JPEGs, instead of pictures of noise")
    parser.add_argument("--quick", action="store_true", help="does it all run?")
    arguments = parser.parse_args()
    rows = measure(arguments.quick, arguments.images)
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()))
