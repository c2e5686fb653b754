"""Time of a batch as B images with k expressions each, against B * k pairs of an image and an expression."""

from typing import Any

import torch
from contenders import EXPRESSIONS, load_or_make_student, make_picture
from timing import take_turns

IMAGES, EXPRESSIONS_AN_IMAGE = 2, 7  # RefCOCO has about 7 expressions an image


@torch.no_grad()
def measure(
    device: torch.device, quick: bool, model_name: str | None = None, repeats: int | None = None
) -> list[dict[str, Any]]:
    """
    Args:
        device (`torch.device`): where the model runs.
        quick (`bool`): whether to take a tiny model.
        model_name (`str`, *optional*): folder or Hub name of a trained model, instead of random weights.
        repeats (`int`, *optional*): how often both take turns; without it 5 times.

    Returns:
        `list[dict]`: a row for each way. The boxes of both must agree.
    """
    model, processor = load_or_make_student(model_name, quick)
    model = model.eval().to(device)

    images, expressions = [make_picture(seed) for seed in range(IMAGES)], EXPRESSIONS[:EXPRESSIONS_AN_IMAGE]
    grouped = processor(images=images, text=[expressions] * IMAGES, return_tensors="pt").to(device)
    pairs = processor(
        images=[image for image in images for _ in expressions], text=expressions * IMAGES, return_tensors="pt"
    ).to(device)
    boxes = {way: model(**inputs).pred_boxes for way, inputs in (("grouped", grouped), ("pairs", pairs))}
    actions = {"grouped": lambda: model(**grouped), "pairs": lambda: model(**pairs)}
    seconds = take_turns(actions, device, repeats or 5)
    count = IMAGES * EXPRESSIONS_AN_IMAGE
    return [
        {
            "batch": f"{IMAGES} images, {EXPRESSIONS_AN_IMAGE} expressions each, {way}",
            "s": seconds[way],
            "ms an expression": 1e3 * seconds[way] / count,
            "of that of pairs": seconds[way] / seconds["pairs"],
            "largest difference of a box": float((boxes[way] - boxes["pairs"]).abs().max()),
        }
        for way in actions
    ]
