"""Training augmentation after TransVG, re-thought so that no expression becomes false and no target is cut away."""

import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2 import ColorJitter

_PAIRS = (
    ("left", "right"),
    ("leftmost", "rightmost"),
    ("leftest", "rightest"),
    ("lefthand", "righthand"),
    ("leftside", "rightside"),
    ("lft", "rt"),  # as players of ReferItGame wrote
)
_MIRRORED = dict(_PAIRS) | {right: left for left, right in _PAIRS}
_MIRRORED_WORD = re.compile(rf"\b({'|'.join(_MIRRORED)})\b", re.IGNORECASE)

# A mirror image shows these wrongly, whatever is done to the words: "right behind the car" means no direction, "left
# over" no side, and letters, numbers and clocks come out reversed.
_UNMIRRORABLE = re.compile(
    r"(?<!\bthe )(?<!\bon )(?<!\bfar )(?<!\bto )\bright[ -]"
    r"(above|across|after|against|along|angled?|at|before|behind|below|beneath|beside|between|beyond|by|down|handed|here"
    r"|in|inside|near|next|off|on|out|outside|over|past|there|through|under|underneath|up|way|where)\b"
    r"|\bleft[ -](alone|behind|handed|out|over|to)\b|\b(are|had|has|have|is|just|that|was|were|who) left\b"
    r"|\ball right\b|\bright side up\b|\b(lefty|leftie|righty|rgt)\b"
    r"|\d|\b(clocks?|clockwise|counterclockwise|initials?|labell?ed|letters?|logos?|numbers?|read|reading|reads|say"
    r"|saying|says|spell|spelled|spelling|spells|text|words?|writing|written)\b"
    r"|\b(north|south)?(east|west)(ern)?\b",
    re.IGNORECASE,
)

# A crop can make these false, or take away the object that they refer to.
_UNCROPPABLE = re.compile(
    r"\b(above|across|adjacent|after|against|ahead|along|alongside|among|around|back|background|backmost|before|behind"
    r"|below|beneath|beside|besides|between|beyond|bottom|bottommost|btm|by|cent(?:er|re)|central|close|closer|closest"
    r"|corner|ctr|distance|distant|edge|eighth|end|facing|far|farther|farthest|fifth|final|first|following|foreground"
    r"|fourth|frame|from|front|frontmost|furthest|half|highest|inner|innermost|inside|last|leading|left\w*|lft|looking"
    r"|lower|lowest|mid|middle|near|nearby|nearer|nearest|next|ninth|only|opposite|outer|outermost|outside|over"
    r"|partial|partially|rear|rearmost|rgt|right\w*|rt|second|seventh|side|sixth|tenth|third|top|topmost|toward|towards"
    r"|under|underneath|upper|visible|\d+(?:st|nd|rd|th))\b",
    re.IGNORECASE,
)

# Jitter can turn gray into white, or orange into brown.
_COLOUR = re.compile(
    r"\b(beige|black(?:ish)?|blonde?|blu(?:e|ish)|bright(?:er|est)?|bronze|brown(?:ish)?|brunette|burgundy"
    r"|colou?r(?:ed|ful)?|cream|cyan|dark(?:er|est)?|gold(?:en)?|gr[ae]y(?:ish)?|green(?:ish)?|khaki|light(?:er|est)?"
    r"|magenta|maroon|navy|orange|pale|pink(?:ish)?|purple|red(?:dish)?|silver|tan(?:ned)?|teal|turquoise|violet|white"
    r"|yellow(?:ish)?)\b",
    re.IGNORECASE,
)


@dataclass
class GroundingAugmentation:
    """
    Random crop, mirror and colour jitter of one image with all its expressions and boxes, and its random scale and
    place on the canvas. It draws from the global random states of Python and PyTorch, which the Trainer seeds.

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

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf import GroundingAugmentation

    >>> augmentation = GroundingAugmentation(flip=1.0)
    >>> _, expressions, boxes = augmentation(image, ["the left triangle"], np.array([[24.0, 59.0, 57.0, 88.0]]))
    >>> expressions, boxes.tolist()  # of an image of 113 pixels width, not cropped, as that could make "left" false
    (['the right triangle'], [[56.0, 59.0, 89.0, 88.0]])
    ```
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
            boxes (`np.ndarray` of shape `(len(expressions), 4)`): xyxy pixels of the image, 0-based, half-open; NaN
                for an expression without a box. An image with such a one is not cropped.

        Returns:
            The image, the expressions and the boxes, changed alike.
        """
        croppable = not np.isnan(boxes).any() and not any(map(_UNCROPPABLE.search, expressions))
        if random.random() < self.crop and croppable:
            image, boxes = self._crop(image, boxes)
        if random.random() < self.flip and not any(map(_UNMIRRORABLE.search, expressions)):
            image, expressions, boxes = mirror(image, expressions, boxes)
        if random.random() < self.color_jitter_probability:
            strength = self.color_jitter * (0.25 if any(map(_COLOUR.search, expressions)) else 1)
            image = ColorJitter(brightness=strength, contrast=strength, saturation=strength)(image.convert("RGB"))
        return image, expressions, boxes

    def placement(self, canvas: int) -> tuple[int, float, float]:
        """
        The long side in pixels of a `canvas`-pixel canvas, and the shares of free canvas above and left of it.

        Example:

        ```python
        >>> from epmvg_hf import GroundingAugmentation

        >>> long_side, above, left = GroundingAugmentation(min_scale=0.7).placement(640)
        >>> 448 <= long_side <= 640 and 0 <= above <= 1 and 0 <= left <= 1
        True
        ```
        """
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
    """
    Mirror the image left to right, and with it the boxes and the words left and right of the expressions.

    Args:
        image (`PIL.Image.Image`): the image.
        expressions (`list[str]`): its expressions.
        boxes (`np.ndarray` of shape `(len(expressions), 4)`): xyxy pixels of the image, 0-based, half-open, or NaN.

    Returns:
        The mirror image, its expressions and its boxes.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.training.augmentation import mirror

    >>> _, expressions, boxes = mirror(image, ["Leftmost star"], np.array([[0.0, 59.0, 33.0, 88.0]]))
    >>> expressions, boxes.tolist()
    (['Rightmost star'], [[80.0, 59.0, 113.0, 88.0]])
    ```
    """
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
