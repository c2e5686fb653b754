"""What a model gains and what its boxes lose in bfloat16, float16 and dynamic int8 (torchao).

In dynamic int8, the weights of linear layers are rounded once and their inputs at every call, with a scale for each
token; convolutions, embeddings and norms stay in float32. The time is that of the model alone, per expression.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TorchAoConfig

from epmvg_hf import EpmVGDataCollator, EpmVGForVisualGrounding, EpmVGProcessor, ImageGroups
from epmvg_hf.evaluation.accuracy import evaluate_boxes
from epmvg_hf.model.modeling_epmvg import MODEL_INPUTS
from epmvg_hf.utils import needs_extra


def load(folder: str, precision: str) -> EpmVGForVisualGrounding:
    """Loads a saved model in this precision."""
    if precision != "int8":
        return EpmVGForVisualGrounding.from_pretrained(folder, dtype=precision)
    with needs_extra("int8", "int8"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    # From float32, because a checkpoint saved in a lower precision would be rounded twice.
    return EpmVGForVisualGrounding.from_pretrained(
        folder, dtype="float32", quantization_config=TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    )


@torch.no_grad()
def predict(
    model: EpmVGForVisualGrounding, processor: EpmVGProcessor, dataset: Dataset, batch_size: int
) -> tuple[np.ndarray, float]:
    """The boxes of all rows `(N, 4)`, xyxy pixels, in the order of the rows, and the time of the model in seconds."""
    boxes, seconds = np.empty((len(dataset), 4), np.float32), 0.0
    names = [name for name in MODEL_INPUTS if name != "labels"]  # The loss would take time, too.
    for batch in DataLoader(ImageGroups(dataset), batch_size, collate_fn=EpmVGDataCollator(processor)):
        inputs = {name: batch[name].to(model.device) for name in names if name in batch}
        start = time.perf_counter()
        outputs = model(**inputs)
        results = processor.post_process_grounding(outputs, batch)  # waits for an accelerator
        seconds += time.perf_counter() - start
        boxes[batch["row_index"]] = torch.stack([result["box"] for result in results]).cpu()
    return boxes, seconds


def saved_megabytes(model: EpmVGForVisualGrounding) -> float:
    """Size of the weights on disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


def measure(
    device: torch.device, model_name: str, dataset: Dataset, precisions: Sequence[str], batch_size: int = 16
) -> list[dict[str, Any]]:
    """
    Args:
        device (`torch.device`): where the model runs.
        model_name (`str`): folder or Hub name of a trained model.
        dataset (`Dataset`): the expressions to find, with boxes.
        precisions (`Sequence[str]`): those to compare with float32: names of PyTorch, or `"int8"`.
        batch_size (`int`, *optional*, defaults to 16): images at a time.

    Returns:
        `list[dict]`: a row for float32 and each of the precisions.
    """
    processor = EpmVGProcessor.from_pretrained(model_name)
    rows, exact = [], None
    for precision in ("float32", *precisions):
        model = load(model_name, precision).to(device)
        boxes, seconds = predict(model, processor, dataset, batch_size)
        exact = boxes if exact is None else exact
        difference = np.abs(boxes - exact)
        scores: dict[str, Any] = evaluate_boxes(boxes, np.array(dataset["box"]), dataset["image_id"][:])
        low, high = scores["acc@0.5_interval"]
        row = {
            "precision": precision,
            "expressions": len(dataset),
            "Acc@0.5": scores["acc@0.5"],
            "95 % interval": f"{low:.3f} to {high:.3f}",
            "mean IoU": scores["mean_iou"],
            "pixels off float32: mean": float(difference.mean()),
            "largest": float(difference.max()),
            "saved MB": saved_megabytes(model),
            "ms an expression": 1e3 * seconds / len(dataset),
        }
        rows.append(row)
    return rows
