#!/usr/bin/env python
"""A table of what a model gains and what its boxes lose in bfloat16, float16 and dynamic int8 (torchao).

python examples/benchmarks/precision.py outputs/demo                     # the test split of shapes
python examples/benchmarks/precision.py outputs/demo --limit 2000        # its first expressions
python examples/benchmarks/precision.py MODEL --dataset_name refcoco --data_dir DIR --split validation

In dynamic int8, the weights of linear layers are rounded once and their inputs at every call, with a scale for each
token; convolutions, embeddings and norms stay in float32. The time is that of the model alone, per expression.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TorchAoConfig

from epmvg_hf import EpmVGDataCollator, EpmVGForVisualGrounding, EpmVGProcessor, ImageGroups, load_grounding_dataset
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
    names = [name for name in MODEL_INPUTS if name != "labels"]  # a loss would cost time
    for batch in DataLoader(ImageGroups(dataset), batch_size, collate_fn=EpmVGDataCollator(processor)):
        inputs = {name: batch[name].to(model.device) for name in names}
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


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a trained model")
    parser.add_argument("--dataset_name", default="shapes")
    parser.add_argument("--data_dir", help="folder with the benchmark's files")
    parser.add_argument("--split", default="test")
    parser.add_argument("--box_format", choices=["xyxy", "xywh"], help="of custom data")
    parser.add_argument("--limit", type=int, help="how many expressions to use, from the first on")
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float16", "int8"], help="besides float32")
    arguments = parser.parse_args(command_line)

    dataset = load_grounding_dataset(
        arguments.dataset_name, arguments.data_dir, arguments.split, box_format=arguments.box_format
    )
    if arguments.limit is not None:
        dataset = dataset.select(range(min(arguments.limit, len(dataset))))
    processor = EpmVGProcessor.from_pretrained(arguments.model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    print(f"{len(dataset):,} expressions on {device}, {torch.get_num_threads()} threads\n")
    print("| precision | Acc@0.5 (95 % interval) | mean IoU | pixels off float32: mean, largest | saved | time |")
    print("| --- | --- | --- | --- | --- | --- |")
    exact = None
    for precision in ("float32", *arguments.precisions):
        model = load(arguments.model, precision).to(device)
        boxes, seconds = predict(model, processor, dataset, arguments.batch_size)
        exact = boxes if exact is None else exact
        difference = np.abs(boxes - exact)
        scores: dict[str, Any] = evaluate_boxes(boxes, np.array(dataset["box"]), dataset["image_id"][:])
        low, high = scores["acc@0.5_interval"]
        print(
            f"| {precision} | {scores['acc@0.5']:.4f} ({low:.3f} to {high:.3f}) | {scores['mean_iou']:.4f} "
            f"| {difference.mean():.2f}, {difference.max():.1f} | {saved_megabytes(model):.1f} MB "
            f"| {1000 * seconds / len(dataset):.2f} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
