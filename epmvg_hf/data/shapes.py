"""The built-in benchmark `shapes`: drawn scenes of coloured shapes, with expressions that each name just one object.

A scene depends on nothing but (seed, split, index), so nothing has to be downloaded and any scene can be drawn again.
Boxes are `(left, top, right, bottom)` in pixels, 0-based and half-open: `right` and `bottom` are one past the object.
"""

import io
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from .progress import bars_only_on_a_terminal

# Raise this number with any change to the pictures or expressions: cached data is looked up by it.
GENERATOR_VERSION = "1.0.0"

# For each split, the id that enters the random seed and the default number of images.
SPLITS = {"train": (0, 12_000), "validation": (1, 500), "test": (2, 1_000), "test_composition": (3, 500)}

COLORS = {
    "red": (215, 30, 35),
    "green": (25, 150, 60),
    "blue": (45, 85, 230),
    "yellow": (250, 220, 30),
    "purple": (150, 55, 185),
    "orange": (255, 135, 0),
    "cyan": (40, 200, 220),
    "gray": (130, 130, 130),
}
# Pairs that only `test_composition` shows, so that it tests whether a model can combine a colour and a shape that it
# has only seen apart. There is one pair per shape and at most one per colour: the other splits still show every shape
# in seven colours and every colour in at least five shapes.
_HELD_OUT = "red triangle, green star, blue circle, yellow cross, purple square, cyan diamond"
HELD_OUT_PAIRS = tuple((color, shape) for color, shape in map(str.split, _HELD_OUT.split(", ")))

# For each size word, the smallest and largest width in pixels. The gap between the two keeps the words unambiguous.
SIZES = {"small": (15, 18), "large": (28, 36)}

LONG_SIDE, MIN_SHORT_SIDE = 128, 96
MIN_OBJECTS, MAX_OBJECTS = 3, 7
OBJECT_GAP = 4  # pixels left free between two boxes
PLACEMENT_ATTEMPTS = 30
MIN_ALPHA = 32  # edge pixels fainter than this are not drawn, so that a tight box ends at pixels one can see

# An object is called further left (or right, ...) than another only if both edges of its box lead by this many pixels.
DIRECTION_MARGIN = 6
# An object is called the closest only if its box centre is closer than that of the second closest by this many pixels.
# With this margin, measuring from the outlines of objects of different shapes gives the same answer.
DISTANCE_MARGIN = 20

KINDS = ("attribute", "size", "extreme", "ordinal", "relation")
MAX_EXPRESSIONS = 8
BARE_SHARE = 0.25  # the share of expressions without the leading "the"
GENERIC_NOUNS = ("object", "shape", "one")
# For each direction the opposite one, words for the object furthest in it, and words for its side of another object.
DIRECTIONS = {
    "left": ("right", ("leftmost",), ("left of", "to the left of")),
    "right": ("left", ("rightmost",), ("right of", "to the right of")),
    "top": ("bottom", ("topmost", "highest"), ("above",)),
    "bottom": ("top", ("bottommost", "lowest"), ("below",)),
}
ORDINALS = {1: "second", 2: "third"}
IMAGES_PER_SHARD = 50

# The share of expressions without an object that come near to one, so that a glance at the colours is not enough.
NEAR_MISS_SHARE = 0.5

_TURNS = [2 * math.pi * i / 40 for i in range(40)]
_RADII = [0.526, 0.22] * 5  # a five-pointed star of outer radius 0.526 is 1 wide
# Outlines as polygons, 1 wide and up to 1 high.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(0.5 + 0.5 * math.cos(turn), 0.5 + 0.5 * math.sin(turn)) for turn in _TURNS],
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 0.866), (0, 0.866)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "star": [(0.5 + r * math.sin(t), 0.526 - r * math.cos(t)) for r, t in zip(_RADII, _TURNS[::4], strict=True)],
    "cross": [
        (x / 3, y / 3)
        for x, y in [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
    ],
}
SHAPES = tuple(OUTLINES)

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]
Pair = tuple[str | None, str | None]  # colour and shape, where `None` means any
Rng = np.random.Generator


@dataclass(frozen=True)
class ShapeObject:
    """One object. `extent` is its width in pixels before it is drawn, `box` the tight box around its drawn pixels."""

    shape: str
    color: str
    size: str
    extent: int
    box: Box


@dataclass(frozen=True)
class Expression:
    """
    A text, of one of the `KINDS`, that denotes object number `target` of its scene and no other, or that denotes
    nothing in it if `target` is `None`.
    """

    kind: str
    text: str
    target: int | None


@dataclass(frozen=True)
class Scene:
    """A picture and its expressions. `background` is the RGB of the top and bottom rows of its gradient."""

    width: int
    height: int
    background: tuple[RGB, RGB]
    objects: tuple[ShapeObject, ...]
    expressions: tuple[Expression, ...]


def make_scene(seed: int, split: str, index: int, num_absent: int = 0) -> Scene:
    """
    Makes scene number `index` of a split (a key of `SPLITS`). The same arguments always give the same scene.
    `num_absent` adds this many expressions, after the others, that denote nothing in it; all else stays the same.

    Example:

    ```python
    >>> from epmvg_hf.data.shapes import make_scene

    >>> scene = make_scene(seed=0, split="validation", index=0)
    >>> scene.width, scene.height, len(scene.objects), scene.expressions[4].text
    (113, 128, 7, 'the small triangle')
    ```
    """
    split_id, _ = SPLITS[split]
    rng = np.random.default_rng([seed, split_id, index])
    held_out = split == "test_composition"
    while True:
        short, landscape = int(rng.integers(MIN_SHORT_SIDE, LONG_SIDE, endpoint=True)), rng.random() < 0.5
        width, height = (LONG_SIDE, short) if landscape else (short, LONG_SIDE)
        objects = _place_objects(width, height, _draw_pairs(held_out, rng), rng)
        if len(objects) < MIN_OBJECTS:
            continue
        expressions = _choose_expressions(_find_expressions(objects, held_out, rng), rng)
        if expressions:
            background = _draw_background(rng)
            absent = _draw_absent(objects, held_out, num_absent, np.random.default_rng([seed, split_id, index, 1]))
            return Scene(width, height, background, objects, expressions + absent)


def render(scene: Scene) -> Image.Image:
    """
    Draws a scene as an RGB picture of `scene.width` x `scene.height` pixels.

    Example:

    ```python
    >>> from epmvg_hf.data.shapes import make_scene, render

    >>> render(make_scene(seed=0, split="validation", index=0)).size
    (113, 128)
    ```
    """
    top, bottom = scene.background
    rows = np.linspace(top, bottom, scene.height).round().astype(np.uint8)
    image = Image.fromarray(np.repeat(rows[:, None], scene.width, axis=1))
    for item in scene.objects:
        image.paste(COLORS[item.color], item.box, _shape_mask(item.shape, item.extent))
    return image


@cache
def _shape_mask(shape: str, extent: int) -> Image.Image:
    """The anti-aliased mask of a shape, cropped to the pixels it changes."""
    scale, length = 8, 8 * extent  # drawing larger and then reducing smooths the edges
    canvas = Image.new("L", (length, length))
    outline = [(x * (length - 1), y * (length - 1)) for x, y in OUTLINES[shape]]
    ImageDraw.Draw(canvas).polygon(outline, fill=255)
    mask = canvas.reduce(scale).point(lambda alpha: alpha if alpha >= MIN_ALPHA else 0)
    return mask.crop(mask.getbbox())


def _draw_background(rng: Rng) -> tuple[RGB, RGB]:
    """Draws a background that is lighter or darker than every object colour by a wide margin."""
    low, high = (222, 250) if rng.random() < 0.5 else (8, 36)
    top, bottom = rng.integers(low, high, size=(2, 3)).tolist()
    return tuple(top), tuple(bottom)


def _draw_pairs(held_out: bool, rng: Rng) -> list[tuple[str, str]]:
    """
    Draws the (colour, shape) pair of each object. Only a few colours and shapes are used in a scene, so that objects
    share them and expressions need more than one word.

    With `held_out`, the colours and shapes are those of two or three held-out pairs. The first object and about half
    of the others are such a pair; the rest recombine their colours and shapes.
    """
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS, endpoint=True))
    if held_out:
        targets = _shuffled(HELD_OUT_PAIRS, rng)[: rng.integers(2, 4)]
        palette = [(color, shape) for color, _ in targets for _, shape in targets]
        pools = [targets] + [targets if rng.random() < 0.5 else palette for _ in range(count - 1)]
    else:
        colors = _shuffled(tuple(COLORS), rng)[: rng.integers(2, 5)]
        shapes = _shuffled(SHAPES, rng)[: rng.integers(2, 5)]
        palette = [(color, shape) for color in colors for shape in shapes if (color, shape) not in HELD_OUT_PAIRS]
        pools = [palette] * count
    return [pool[rng.integers(len(pool))] for pool in pools]


def _place_objects(width: int, height: int, pairs: list[tuple[str, str]], rng: Rng) -> tuple[ShapeObject, ...]:
    """Gives each pair a size and a free place on the canvas. A pair for which there is no place is left out."""
    objects: list[ShapeObject] = []
    for color, shape in pairs:
        size = "small" if rng.random() < 0.5 else "large"
        extent = int(rng.integers(*SIZES[size], endpoint=True))
        mask = _shape_mask(shape, extent)
        lefts = rng.integers(1, width - mask.width, size=PLACEMENT_ATTEMPTS).tolist()
        tops = rng.integers(1, height - mask.height, size=PLACEMENT_ATTEMPTS).tolist()
        for left, top in zip(lefts, tops, strict=True):
            box = (left, top, left + mask.width, top + mask.height)
            if all(max(_gaps(box, other.box).values()) >= OBJECT_GAP for other in objects):
                objects.append(ShapeObject(shape, color, size, extent, box))
                break
    return tuple(objects)


def _gaps(a: Box, b: Box) -> dict[str, int]:
    """For each direction, the free pixels between two boxes if `a` lies that way of `b`, or else a negative number."""
    return {"left": b[0] - a[2], "right": a[0] - b[2], "top": b[1] - a[3], "bottom": a[1] - b[3]}


def _find_expressions(objects: Sequence[ShapeObject], held_out: bool, rng: Rng) -> dict[str, list[Expression]]:
    """
    Finds all expressions, without an article so far, that denote one object beyond doubt. With `held_out`, only those
    that name both the colour and the shape of a held-out pair.
    """
    groups = _group(objects)
    subjects = {pair: members for pair, members in groups.items() if not held_out or pair in HELD_OUT_PAIRS}
    generic, extreme_words, relation_words = _draw_words(rng)
    references = _references(groups, generic, rng)
    beyond = _beyond(objects)
    centers = [((item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2) for item in objects]
    found: dict[str, list[Expression]] = {kind: [] for kind in KINDS}

    def add(kind: str, text: str, target: int) -> None:
        found[kind].append(Expression(kind, text, target))

    for pair, members in subjects.items():
        noun = _noun(pair, generic)
        if len(members) == 1:
            add("attribute", noun, *members)
            continue
        # Several objects fit the noun, so it takes a size or a place to single one out.
        for size in SIZES:
            matching = [i for i in members if objects[i].size == size]
            if len(matching) == 1:
                add("size", f"{size} {noun}", *matching)
        for direction, (opposite, _, _) in DIRECTIONS.items():
            for i in members:
                ahead, behind = members & beyond[direction][i], members & beyond[opposite][i]
                if len(ahead) + len(behind) != len(members) - 1:
                    continue  # another object is about as far in this direction, so the rank is unclear
                if not ahead:
                    add("extreme", f"{extreme_words[direction]} {noun}", i)
                elif len(ahead) in ORDINALS:
                    add("ordinal", f"{ORDINALS[len(ahead)]} {noun} from the {direction}", i)

        for reference, name in references.items():
            others = members - {reference}
            if len(others) == 1:
                continue
            for direction, (opposite, _, _) in DIRECTIONS.items():
                inside, outside = others & beyond[direction][reference], others & beyond[opposite][reference]
                if len(inside) == 1 and len(inside) + len(outside) == len(others):
                    (target,) = inside
                    if _gaps(objects[target].box, objects[reference].box)[direction] >= 0:
                        add("relation", f"{noun} {relation_words[direction]} the {name}", target)
            (least, target), (second, _), *_ = sorted((math.dist(centers[i], centers[reference]), i) for i in others)
            if second - least >= DISTANCE_MARGIN:
                add("relation", f"{noun} closest to the {name}", target)
    return found


def _draw_absent(objects: Sequence[ShapeObject], held_out: bool, count: int, rng: Rng) -> tuple[Expression, ...]:
    """
    Draws expressions about what the scene does not show, all of them different. Near misses name a colour and a shape
    of which one is there; of what the others name nothing is.

    Nouns are held-out pairs with `held_out`, and never without it. A model that in training found a held-out pair in
    expressions without an object only would learn that there is no such thing.
    """
    groups = _group(objects)
    generic, extreme_words, relation_words = _draw_words(rng)
    references = list(_references(groups, generic, rng).values())
    missing = [
        pair
        for pair in itertools.product((*COLORS, None), (*SHAPES, None))
        if pair not in groups and (pair in HELD_OUT_PAIRS) == held_out
    ]
    near = [
        (color, shape)
        for color, shape in missing
        if color and shape and ({(color, None), (None, shape)} & groups.keys())
    ]
    far = [pair for pair in missing if pair not in near]

    def pick(items: Sequence) -> Any:
        return items[int(rng.integers(len(items)))]

    found: dict[str, Expression] = {}
    while len(found) < count:
        kind, direction = pick([kind for kind in KINDS if kind != "relation" or references]), pick(tuple(DIRECTIONS))
        noun = _noun(pick(near if near and (not far or rng.random() < NEAR_MISS_SHARE) else far), generic)
        if kind == "size":
            noun = f"{pick(tuple(SIZES))} {noun}"
        elif kind == "extreme":
            noun = f"{extreme_words[direction]} {noun}"
        elif kind == "ordinal":
            noun = f"{pick(tuple(ORDINALS.values()))} {noun} from the {direction}"
        elif kind == "relation":
            noun = f"{noun} {pick([relation_words[direction], 'closest to'])} the {pick(references)}"
        text = noun if rng.random() < BARE_SHARE else f"the {noun}"
        found.setdefault(noun, Expression(kind, text, target=None))
    return tuple(found.values())


def _group(objects: Sequence[ShapeObject]) -> dict[Pair, set[int]]:
    """The objects that each noun fits, with a colour, a shape, both or none."""
    groups: dict[Pair, set[int]] = defaultdict(set)
    for i, item in enumerate(objects):
        for color, shape in itertools.product((item.color, None), (item.shape, None)):
            groups[color, shape].add(i)
    return dict(groups)


def _draw_words(rng: Rng) -> tuple[str, dict[str, str], dict[str, str]]:
    """
    Draws the generic noun, and for each direction the word for an extreme and the words for a relation. A scene uses
    one of several synonyms throughout, so that no two of its expressions say the same.
    """
    generic = _shuffled(GENERIC_NOUNS, rng)[0]
    extreme_words = {direction: _shuffled(words, rng)[0] for direction, (_, words, _) in DIRECTIONS.items()}
    relation_words = {direction: _shuffled(words, rng)[0] for direction, (_, _, words) in DIRECTIONS.items()}
    return generic, extreme_words, relation_words


def _noun(pair: Pair, generic: str) -> str:
    color, shape = pair
    return f"{color or ''} {shape or generic}".strip()


def _beyond(objects: Sequence[ShapeObject]) -> dict[str, list[set[int]]]:
    """For each direction and object, the other objects that lie clearly further in it by both of their edges."""
    boxes = [item.box for item in objects]

    def leading(box: Box, edge: int, sign: int) -> set[int]:
        least, least_far = sign * box[edge] + DIRECTION_MARGIN, sign * box[edge + 2] + DIRECTION_MARGIN
        return {i for i, b in enumerate(boxes) if sign * b[edge] >= least and sign * b[edge + 2] >= least_far}

    axes = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
    return {direction: [leading(box, *axis) for box in boxes] for direction, axis in axes.items()}


def _references(groups: dict[Pair, set[int]], generic: str, rng: Rng) -> dict[int, str]:
    """One noun for each object that can be singled out by its colour, its shape or both."""
    choices: dict[int, list[str]] = defaultdict(list)
    for pair, members in groups.items():
        if len(members) == 1:
            choices[min(members)].append(_noun(pair, generic))
    return {i: _shuffled(texts, rng)[0] for i, texts in choices.items()}


def _choose_expressions(found: dict[str, list[Expression]], rng: Rng) -> tuple[Expression, ...]:
    """
    Chooses up to `MAX_EXPRESSIONS`. The kinds take turns, and each time the object with the fewest expressions so far
    gets one, so that a scene shows all kinds and names many of its objects.
    """
    pools = [_shuffled(found[kind], rng) for kind in _shuffled(KINDS, rng)]
    times_named: Counter[int | None] = Counter()
    chosen: list[Expression] = []
    while any(pools) and len(chosen) < MAX_EXPRESSIONS:
        for pool in filter(None, pools):
            best = min(pool, key=lambda expression: times_named[expression.target])
            pool.remove(best)
            times_named[best.target] += 1
            text = best.text if rng.random() < BARE_SHARE else f"the {best.text}"
            chosen.append(Expression(best.kind, text, best.target))
    return tuple(chosen[:MAX_EXPRESSIONS])


def _shuffled(items: Sequence, rng: Rng) -> list:
    return [items[i] for i in rng.permutation(len(items)).tolist()]


@dataclass
class ShapesConfig(datasets.BuilderConfig):
    """
    The split to prepare, the seed, the number of images, which by default is that of `SPLITS`, and the number of
    expressions of each image that denote nothing in it.
    """

    split: str = "train"
    seed: int = 0
    num_images: int | None = None
    absent_per_image: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in SPLITS:
            raise ValueError(f"Unknown split {self.split!r} of shapes: choose one of {', '.join(SPLITS)}.")
        if self.num_images is None:
            self.num_images = SPLITS[self.split][1]
        if not isinstance(self.num_images, int) or self.num_images < 1:
            raise ValueError(f"`num_images` must be a positive integer, got {self.num_images!r}.")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"`seed` must be a non-negative integer, got {self.seed!r}.")
        per_image = self.absent_per_image
        if per_image is not None and (not isinstance(per_image, int) or not 1 <= per_image <= MAX_EXPRESSIONS):
            raise ValueError(f"`absent_per_image` must be an integer from 1 to {MAX_EXPRESSIONS}, got {per_image!r}.")

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        # Defaults are part of the name of the cache folder: when one changes, the old data is not taken for the new.
        drawn = {"split": self.split, "seed": self.seed, "num_images": self.num_images}
        given = {name: value for name, value in config_kwargs.items() if name != "absent_per_image"}
        if self.absent_per_image is not None:
            drawn["absent_per_image"] = self.absent_per_image
        return super().create_config_id({**given, **drawn}, custom_features)


class Shapes(datasets.GeneratorBasedBuilder):
    """Prepares one split of the benchmark with one row per expression. The rows of one image are consecutive."""

    BUILDER_CONFIG_CLASS = ShapesConfig
    VERSION = datasets.Version(GENERATOR_VERSION)

    def _info(self) -> datasets.DatasetInfo:
        box = datasets.List(datasets.Value("float32"), length=4)
        string = datasets.Value("string")
        columns = {
            "image": datasets.Image(),
            "image_id": string,
            "expression": string,
            "box": box,
            "kind": string,
            "objects": datasets.List({"shape": string, "color": string, "size": string, "box": box}),
        }
        if self.config.absent_per_image is not None:
            columns["absent"] = datasets.Value("bool")
        return datasets.DatasetInfo(description=__doc__, features=datasets.Features(columns))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        # `datasets` divides lists among processes and among the workers of a data loader.
        indices = range(self.config.num_images)
        shards = [indices[i : i + IMAGES_PER_SHARD] for i in indices[::IMAGES_PER_SHARD]]
        generator = datasets.SplitGenerator(name=self.config.split, gen_kwargs={"index_ranges": shards})
        # Very few scenes have fewer expressions. With this number the progress bar knows how much time remains, and
        # `datasets` replaces it by the real one.
        per_image = MAX_EXPRESSIONS + (self.config.absent_per_image or 0)
        generator.split_info.num_examples = per_image * self.config.num_images
        return [generator]

    def _generate_examples(self, index_ranges: list[range]) -> Iterator[tuple[str, dict]]:
        for index in (index for index_range in index_ranges for index in index_range):
            scene = make_scene(self.config.seed, self.config.split, index, self.config.absent_per_image or 0)
            png = io.BytesIO()
            render(scene).save(png, format="PNG", compress_level=1)
            image_id = f"{self.config.seed}-{self.config.split}-{index:06d}"
            shared = {
                "image": {"bytes": png.getvalue(), "path": None},
                "image_id": image_id,
                "objects": [{"shape": o.shape, "color": o.color, "size": o.size, "box": o.box} for o in scene.objects],
            }
            for number, expression in enumerate(scene.expressions):
                target = expression.target
                box = None if target is None else scene.objects[target].box
                row: dict[str, Any] = {**shared, "expression": expression.text, "box": box, "kind": expression.kind}
                if self.config.absent_per_image is not None:
                    row["absent"] = target is None
                yield f"{image_id}-{number}", row


def load_shapes(
    split: str,
    seed: int = 0,
    num_images: int | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    absent_per_image: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Draws one split of the benchmark.

    Args:
        split (`str`):
            A key of `SPLITS`. `"test_composition"` is about (colour, shape) pairs that the other splits never show.
        seed (`int`, *optional*, defaults to 0): Scenes of different seeds, and of different splits, are unrelated.
        num_images (`int`, *optional*):
            Number of images, by default that of `SPLITS`. A smaller number gives the first images of a larger one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to draw scenes while iterating, without writing a file.
        num_proc (`int`, *optional*): Number of processes that draw. Has no effect when streaming.
        cache_dir (`str`, *optional*): Where the drawn scenes are kept. Defaults to the cache of `datasets`.
        absent_per_image (`int`, *optional*):
            Adds this many rows to each image, 1 to 8, whose expressions are of the same kinds but true of no object of
            the scene. About half of them are near misses, such as the right shape in another colour.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: One row per expression with the columns `image`, `image_id`,
        `expression`, `box` (xyxy float pixels), `kind` (one of `KINDS`) and `objects` (every object of the scene).
        With `absent_per_image` there is also `absent` (`bool`): the added rows, in which it is true, have the box
        `None`. The other rows are the same as without them.

    Raises:
        `ValueError`: There is no such split, or `seed`, `num_images` or `absent_per_image` is out of range.

    Example:

    ```python
    >>> from epmvg_hf.data.shapes import load_shapes

    >>> load_shapes("validation", num_images=4)[4]["box"]
    [64.0, 20.0, 82.0, 36.0]
    >>> with_absent = load_shapes("validation", num_images=4, absent_per_image=2)
    >>> [row["expression"] for row in with_absent if row["absent"]][:2]
    ['the leftmost blue triangle', 'the orange circle closest to the green diamond']
    ```
    """
    builder = Shapes(
        dataset_name="shapes",
        cache_dir=cache_dir,
        split=split,
        seed=seed,
        num_images=num_images,
        absent_per_image=absent_per_image,
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    with bars_only_on_a_terminal():
        builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset(split=split)
