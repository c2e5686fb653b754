"""Who is compared: our student and its rivals, each with what its own processor makes of the same picture."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import rivals
import torch
from PIL import Image
from torch import nn
from transformers import BertTokenizer, GroundingDinoImageProcessor, Owlv2ImageProcessor

from epmvg_hf import EpmVGConfig, EpmVGForVisualGrounding, EpmVGImageProcessor, EpmVGProcessor

CONFIGS = Path(__file__).parents[1] / "configs"
PICTURE = (640, 480)  # width and height of most pictures of COCO, and so of RefCOCO
EXPRESSIONS = [
    "the man in the blue shirt",
    "woman on the left holding a red umbrella",
    "the small brown dog next to the bench",
    "second chair from the right",
    "the boy who is about to throw the ball",
    "white car behind the bus",
    "the largest elephant standing in the water",
    "a plate with two slices of pizza on it",
    "girl with long hair and a green jacket",
    "the zebra whose head is down",
    "bottom left corner of the wooden table",
    "man sitting in front of the laptop",
    "the cup that is closest to the keyboard",
    "a person in black riding the white horse",
    "the cat lying on top of the sofa",
    "blue suitcase between the two others",
]
TRANSVG = "TransVG equivalent"

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """
    A model, and how it is used.

    Args:
        name (`str`): for the table.
        make_model (`Callable`): the model with random weights, on the CPU.
        make_inputs (`Callable`): the model's inputs for the first k of `EXPRESSIONS` about the picture.
        inference (`tuple[int, ...]`): the numbers of expressions that the model is asked for at a time.
        training (`tuple[int, ...]`): the numbers of expressions for a training step.
    """

    name: str
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[int], Inputs]
    inference: tuple[int, ...]
    training: tuple[int, ...] = ()


def make_contenders(quick: bool) -> list[Contender]:
    """All contenders, with tiny models if it must be `quick`."""
    many, few = ((1, 2), (1, 2)) if quick else ((1, 4, 8, 16), (1, 8))
    student = partial(make_student, quick)
    return [
        Contender("student", student, partial(student_inputs, quick), many, few[1:]),
        Contender("student, optimized", partial(optimized, student), partial(student_inputs, quick), many),
        Contender(TRANSVG, partial(rivals.make_transvg, quick), partial(transvg_inputs, quick), few, few[1:]),
        Contender(
            "GroundingDINO-tiny",
            partial(rivals.make_grounding_dino, quick),
            partial(grounding_dino_inputs, quick),
            few,
        ),
        Contender("OWLv2-base", partial(rivals.make_owlv2, quick), partial(owlv2_inputs, quick), few),
    ]


def make_student(quick: bool) -> EpmVGForVisualGrounding:
    """The model of the recipes with random weights, or the demo's."""
    return EpmVGForVisualGrounding(read_config(quick))


def optimized(make_model: Callable[[], EpmVGForVisualGrounding]) -> EpmVGForVisualGrounding:
    """The model after what a user calls before using it."""
    return make_model().optimize_for_inference()


def read_config(quick: bool) -> EpmVGConfig:
    return EpmVGConfig(**json.loads((CONFIGS / ("tiny.json" if quick else "epmvg.json")).read_text()))


def make_picture(seed: int = 0) -> Image.Image:
    """Noise: what is on a picture does not matter to the time."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (PICTURE[1], PICTURE[0], 3), np.uint8))


def make_processor(side: int, max_text_length: int) -> EpmVGProcessor:
    """A processor whose tokenizer has a token for each word, like BERT's for words as usual as these."""
    words = sorted({word for expression in EXPRESSIONS for word in expression.split()})
    tokenizer = BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    )
    image_processor = EpmVGImageProcessor(size={"height": side, "width": side})
    return EpmVGProcessor(image_processor, tokenizer, max_text_length=max_text_length)


def load_or_make_student(model_name: str | None, quick: bool) -> tuple[EpmVGForVisualGrounding, EpmVGProcessor]:
    """A trained model with its processor, or without a name a student with random weights."""
    if model_name is not None:
        return EpmVGForVisualGrounding.from_pretrained(model_name), EpmVGProcessor.from_pretrained(model_name)
    torch.manual_seed(0)
    config = read_config(quick)
    return make_student(quick), make_processor(config.image_size, config.max_text_length)


def student_inputs(quick: bool, expressions: int) -> Inputs:
    """One picture with all expressions."""
    config = read_config(quick)
    processor = make_processor(config.image_size, config.max_text_length)
    return dict(processor(images=make_picture(), text=EXPRESSIONS[:expressions], return_tensors="pt"))


def transvg_inputs(quick: bool, expressions: int) -> Inputs:
    """The same picture again for each expression, and texts padded to 20 tokens."""
    sizes = rivals.TINY_TRANSVG if quick else rivals.TransVGSizes()
    processor = make_processor(sizes.canvas, sizes.tokens)
    picture = processor(images=make_picture(), return_tensors="pt")
    texts = processor.tokenizer(
        EXPRESSIONS[:expressions], padding="max_length", max_length=sizes.tokens, return_tensors="pt"
    )
    repeated = {name: picture[name].repeat_interleave(expressions, 0) for name in ("pixel_values", "pixel_mask")}
    return {**repeated, "input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}


def grounding_dino_inputs(quick: bool, expressions: int) -> Inputs:
    """One picture, and all expressions in one text, each with a full stop, which is how this model takes several."""
    small = {"size": {"shortest_edge": 64, "longest_edge": 107}} if quick else {}
    picture = GroundingDinoImageProcessor(**small)(images=make_picture(), return_tensors="pt")
    rng = np.random.default_rng(0)
    # The model finds the ends of its expressions by the ids of [CLS], [SEP] and the full stop in BERT's vocabulary.
    ids = [101]
    for expression in EXPRESSIONS[:expressions]:
        ids += [*rng.integers(2000, 30000, len(expression.split())), 1012]
    input_ids = torch.tensor([[*ids, 102]])
    return {**picture, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def owlv2_inputs(quick: bool, expressions: int) -> Inputs:
    """One picture with all expressions, padded to 16 tokens as this model's tokenizer does."""
    small = {"size": {"height": 64, "width": 64}} if quick else {}
    picture = Owlv2ImageProcessor(**small)(images=make_picture(), return_tensors="pt")
    rng = np.random.default_rng(0)
    input_ids = torch.zeros(expressions, 16, dtype=torch.long)
    for row, expression in zip(input_ids, EXPRESSIONS, strict=False):
        words = rng.integers(1000, 49000, len(expression.split()))
        row[: len(words) + 2] = torch.tensor([49406, *words, 49407])
    return {**picture, "input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
