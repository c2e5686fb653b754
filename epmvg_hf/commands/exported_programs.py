"""
A model as two programs of ONNX or torch.export: one encodes an image, the other grounds expressions in it.

    pixel_values, pixel_mask                                             -> image      -> visual_tokens, visual_mask
    visual_tokens, visual_mask, input_ids, attention_mask, image_index   -> expression -> pred_boxes

An image is encoded once, however many expressions it has and whenever they are given. The programs take any number of
images B, expressions N and tokens L (2 to `max_text_length`), on the canvas of the processor, which is saved beside
them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.export import Dim
from transformers.exporters import DynamoConfig, DynamoExporter, ExportedModel, OnnxConfig, OnnxExporter

from ..model.modeling_epmvg import EpmVGForVisualGrounding
from ..model.processing_epmvg import EpmVGProcessor
from ..utils import needs_extra

TOLERANCE = 1e-4  # largest difference of a box coordinate, as a share of the canvas
IMAGE_INPUTS = ("pixel_values", "pixel_mask")
EXPRESSION_INPUTS = ("visual_tokens", "visual_mask", "input_ids", "attention_mask", "image_index")


class ImageHalf(EpmVGForVisualGrounding):
    """The visual branch alone, up to the image tokens that the model accepts as `visual_tokens`."""

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.get_image_features(pixel_values, pixel_mask, return_dict=True)
        return {"visual_tokens": features.last_hidden_state, "visual_mask": features.visual_mask}


class ExpressionHalf(EpmVGForVisualGrounding):
    """The rest of the model, from image tokens and expressions to boxes."""

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pred_boxes": super().forward(**inputs, return_dict=True).pred_boxes}


def export_halves(folder: str, output_format: str) -> ExportedModel:
    """Export the model in a folder to "onnx" or "torch", with the components "image" and "expression"."""
    if output_format == "onnx":
        with needs_extra("epmvg export", "onnx"):
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        exporter, config_class = OnnxExporter(), OnnxConfig
    else:
        exporter, config_class = DynamoExporter(), DynamoConfig
    image_half, expression_half = ImageHalf.from_pretrained(folder), ExpressionHalf.from_pretrained(folder)
    processor = EpmVGProcessor.from_pretrained(folder)

    inputs = make_inputs(processor, num_images=2, num_expressions=3)
    with torch.no_grad():
        inputs |= image_half(*(inputs[name] for name in IMAGE_INPUTS))
    images, expressions = Dim("images"), Dim("expressions")
    tokens = Dim("tokens", min=2, max=image_half.config.max_text_length)
    axes = {
        **{name: {0: images} for name in (*IMAGE_INPUTS, "visual_tokens", "visual_mask")},
        **{name: {0: expressions, 1: tokens} for name in ("input_ids", "attention_mask")},
        "image_index": {0: expressions},
    }
    components = {}
    for name, model, names in (
        ("image", image_half, IMAGE_INPUTS),
        ("expression", expression_half, EXPRESSION_INPUTS),
    ):
        config = config_class(dynamic=True, dynamic_shapes={name: axes[name] for name in names})
        exported = exporter.export(model, {name: inputs[name] for name in names}, config)
        components[name] = exported.components["model"]
    return ExportedModel(components, exporter.export_format, config=image_half.config)


def make_inputs(processor: EpmVGProcessor, num_images: int, num_expressions: int) -> dict[str, torch.Tensor]:
    """Images of noise of various sizes, with expressions of various lengths that take turns over the images."""
    rng = np.random.default_rng(num_images)
    sizes = rng.integers(40, 200, size=(num_images, 2))
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    texts = [
        ["the red circle" + " on the left" * (k % 3) for k in range(image, num_expressions, num_images)]
        for image in range(num_images)
    ]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    return {name: inputs[name] for name in (*IMAGE_INPUTS, "input_ids", "attention_mask", "image_index")}


def run(exported: ExportedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run one program after the other, which gives boxes `(N, 4)` as (cx, cy, w, h) in [0, 1] of the canvas."""
    seen = exported.runners["image"](**{name: inputs[name] for name in IMAGE_INPUTS})
    inputs = {**inputs, "visual_tokens": seen["visual_tokens"], "visual_mask": seen["visual_mask"]}
    found = exported.runners["expression"](**{name: inputs[name] for name in EXPRESSION_INPUTS})
    return torch.as_tensor(found["pred_boxes"])


def compare(model_folder: str, programs_folder: Path) -> Iterator[str]:
    """
    Runs the programs of a folder with other numbers of images, expressions and tokens than they were exported with.

    Returns:
        `Iterator[str]`: a sentence for each of them with the largest difference from the boxes of the model.

    Raises:
        ValueError: a difference is larger than `TOLERANCE`.
    """
    processor = EpmVGProcessor.from_pretrained(programs_folder)
    # Programs of torch are pickled, so transformers 5.24 loads them only for those who trust them, as we do here.
    exported = ExportedModel.from_pretrained(programs_folder, trust_remote_code=True)
    model = EpmVGForVisualGrounding.from_pretrained(model_folder)
    for num_images, num_expressions in ((1, 1), (2, 3), (3, 7)):
        inputs = make_inputs(processor, num_images, num_expressions)
        with torch.no_grad():
            difference = (run(exported, inputs) - model(**inputs).pred_boxes).abs().max().item()
        length = inputs["input_ids"].shape[1]
        yield f"B {num_images}, N {num_expressions}, L {length}: largest difference of a box {difference:.1e}"
        if difference > TOLERANCE:
            raise ValueError(
                f"the boxes of the programs differ from those of the model by more than {TOLERANCE} of the canvas"
            )
