"""Training augmentation after TransVG, re-thought so that no expression becomes false and no target is cut away."""

import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2 import ColorJitter

_MIRRORED = {
    "left": "right",
    "right": "left",
    "leftmost": "rightmost",
    "rightmost": "leftmost",
    "lefthand": "righthand",
    "righthand": "lefthand",
}
_MIRRORED_WORD = re.compile(rf"\b({'|'.join(_MIRRORED)})\b", re.IGNORECASE)

# A mirror image shows these wrongly, whatever is done to the words: "right behind the car" means no direction, "left
# over" no side, and letters, numbers and clocks come out reversed.
_UNMIRRORABLE = re.compile(
    r"(?<!\bthe )(?<!\bon )(?<!\bfar )(?<!\bto )\bright[ -]"
    r"(above|after|angled?|at|before|behind|below|beside|between|by|down|handed|here|in|inside|near|next|on|out|outside"
    r"|over|there|through|under|up|way)\b"
    r"|\bleft[ -](alone|behind|handed|out|over|to)\b|\ball right\b|\bright side up\b"
    r"|\d|\b(clock|clockwise|counterclockwise|east|initials?|letters?|logo|numbers?|reading|reads|says|spells|text"
    r"|west|words?|writing)\b",
    re.IGNORECASE,
)

# A crop can make these false, or take away the object that they refer to.
_UNCROPPABLE = re.compile(
    r"\b(above|across|after|against|among|around|back|background|before|behind|below|beneath|beside|besides|between"
    r"|bottom|bottommost|by|cent(?:er|re)|close|closer|closest|corner|edge|end|far|farther|farthest|fifth|first"
    r"|foreground|fourth|from|front|furthest|highest|inside|last|left|lefthand|leftmost|lower|lowest|middle|near|nearer"
    r"|nearest|next|opposite|outside|over|right|righthand|rightmost|second|side|sixth|third|top|topmost|toward|towards"
    r"|under|underneath|upper|[1-9](?:st|nd|rd|th))\b",
    re.IGNORECASE,
)

# Jitter can turn gray into white, or orange into brown.
_COLOUR = re.compile(
    r"\b(beige|black|blond|blonde|blue|bright|brown|colou?r(?:ed|ful)?|cyan|dark|darker|gold|golden|gr[ae]y|green"
    r"|light|lighter|maroon|navy|orange|pale|pink|purple|red|silver|tan|teal|violet|white|yellow)\b",
    re.IGNORECASE,
)


@dataclass
class GroundingAugmentation:
    """
    Random crop, mirror and colour jitter of one image with all its expressions and boxes, and its random scale and
    place on the canvas. It draws from Python's `random`, which the Trainer seeds, restores and seeds in the workers.

    What TransVG (djiajunustc/TransVG: datasets/transforms.py) does and this does not: crop the target away, swap
    `left` inside `bleft`, crop or mirror what an expression then describes wrongly.

    Args:
        flip (`float`, *optional*, defaults to 0.5):
            Probability of mirroring; left and right then change places in the expressions. Skipped when an expression
            cannot be mirrored ("right behind", letters and numbers).
        crop (`float`, *optional*, defaults to 0.5):
            Probability of a crop that keeps every box whole. Skipped when an expression speaks of position, order or
            another object's place.
        min_crop (`float`, *optional*, defaults to 0.6):
            Smallest share of each side that a crop keeps.
        color_jitter (`float`, *optional*, defaults to 0.4):
            Strength for brightness, contrast and saturation; a quarter of it when an expression names a colour.
        color_jitter_probability (`float`, *optional*, defaults to 0.8):
            Probability of the colour jitter.
        min_scale (`float`, *optional*, defaults to 0.7):
            The long side takes between this share and all of the canvas (TransVG: 448 to 640 pixels of 640).
    """

    flip: float = 0.5
    crop: float = 0.5
    min_crop: float = 0.6
    color_jitter: float = 0.4
    color_jitter_probability: float = 0.8
    min_scale: float = 0.7

    def __call__(
        self, image: Image.Image, expressions: list[str], boxes: np.ndarray
    ) -> tuple[Image.Image, list[str], np.ndarray]:
        """
        Args:
            image (`PIL.Image.Image`): the image.
            expressions (`list[str]`): its expressions.
            boxes (`np.ndarray` of shape `(len(expressions), 4)`): xyxy pixels of the image, 0-based, half-open.

        Returns:
            The image, the expressions and the boxes, changed alike.
        """
        if random.random() < self.crop and not any(map(_UNCROPPABLE.search, expressions)):
            image, boxes = self._crop(image, boxes)
        if random.random() < self.flip and not any(map(_UNMIRRORABLE.search, expressions)):
            image, expressions, boxes = mirror(image, expressions, boxes)
        if random.random() < self.color_jitter_probability:
            strength = self.color_jitter * (0.25 if any(map(_COLOUR.search, expressions)) else 1)
            image = ColorJitter(brightness=strength, contrast=strength, saturation=strength)(image.convert("RGB"))
        return image, expressions, boxes

    def placement(self, canvas: int) -> tuple[int, float, float]:
        """The long side in pixels of a `canvas`-pixel canvas, and the shares of free canvas above and left of it."""
        return random.randint(round(self.min_scale * canvas), canvas), random.random(), random.random()

    def _crop(self, image: Image.Image, boxes: np.ndarray) -> tuple[Image.Image, np.ndarray]:
        left, right = self._window(image.width, boxes[:, 0].min(), boxes[:, 2].max())
        top, bottom = self._window(image.height, boxes[:, 1].min(), boxes[:, 3].max())
        return image.crop((left, top, right, bottom)), boxes - np.array([left, top, left, top], boxes.dtype)

    def _window(self, side: int, low: float, high: float) -> tuple[int, int]:
        """A random stretch [start, stop) of [0, side) that holds [low, high] and at least `min_crop` of the side."""
        low, high = max(0, int(low)), min(side, int(np.ceil(high)))
        length = random.randint(min(side, max(round(self.min_crop * side), high - low)), side)
        start = random.randint(max(0, high - length), min(low, side - length))
        return start, start + length


def mirror(image: Image.Image, expressions: list[str], boxes: np.ndarray) -> tuple[Image.Image, list[str], np.ndarray]:
    """Mirror the image left to right, and with it the boxes and the words left and right of the expressions."""
    mirrored = np.stack(
        [image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], axis=-1
    ).astype(boxes.dtype)
    return ImageOps.mirror(image), [_mirror_words(expression) for expression in expressions], mirrored


def _mirror_words(expression: str) -> str:
    def swap(match: re.Match) -> str:
        word = match[0]
        swapped = _MIRRORED[word.lower()]
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped

    return _MIRRORED_WORD.sub(swap, expression)
