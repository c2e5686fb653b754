"""Trainings and evaluations, for `test_trainer.py` to run on one and on two processes."""

import json
import sys
from pathlib import Path

import datasets
from transformers import TrainerCallback

from epmvg_hf import EpmVGForVisualGrounding, EpmVGTrainer, EpmVGTrainingArguments
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor, uneven_shapes
from tests.fixtures.tiny_teacher import TinyTeacher

TERMS = {"relation_loss_coefficient": 1.0, "feature_loss_coefficient": 1.0, "teacher_map_loss_coefficient": 1.0}


class GradientNorms(TrainerCallback):
    """Keeps the norm of each parameter's gradient at each step."""

    def __init__(self):
        self.norms: list[list[float]] = []

    def on_pre_optimizer_step(self, *args, model, **kwargs):
        gradients = (parameter.grad for parameter in model.parameters() if parameter.requires_grad)
        self.norms.append([0.0 if gradient is None else gradient.norm().item() for gradient in gradients])


def train_long(folder: Path, batch_size: int, images: int) -> dict:
    """Twenty steps, each of whose epochs ends with a step that is not full."""
    settings = {**ONE_STEP, "max_steps": 20, "logging_steps": 1, "optim": "sgd", "learning_rate": 1e-3}
    args = EpmVGTrainingArguments(str(folder), per_device_train_batch_size=batch_size, **settings, **TERMS)
    with args.main_process_first():
        train = uneven_shapes([1 + index % 4 for index in range(images)])
    gradients = GradientNorms()
    model = tiny_model(box_head="map", frozen_batch_norm=True, teacher_projection_dim=24)
    parts = {"processing_class": tiny_processor(), "teacher": TinyTeacher(), "callbacks": [gradients]}
    trainer = EpmVGTrainer(model, args, train_dataset=train, **parts)
    trainer.train()
    metrics = trainer.evaluate(train)
    logs = [
        {name: value for name, value in entry.items() if "loss" in name or name in ("grad_norm", "epoch")}
        for entry in trainer.state.log_history[:20]
    ]
    exact = {name: value for name, value in metrics.items() if "loss" in name or "acc" in name or "iou" in name}
    return {"logs": logs, "gradients": gradients.norms, "metrics": exact}


def main(folder: Path, batch_size: int):
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    args = EpmVGTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        **ONE_STEP,
    )
    with args.main_process_first():
        dataset = uneven_shapes([8, 1, 5, 8, 3])
    train = dataset.filter(lambda image_id: not image_id.endswith("4"), input_columns="image_id")

    model = tiny_model(box_head="map", frozen_batch_norm=True)
    trainer = EpmVGTrainer(model, args, train_dataset=train, eval_dataset=dataset, processing_class=tiny_processor())
    trainer.train()
    output = trainer.predict(dataset)
    metrics = trainer.evaluate()

    # Batch norms that are trained have seen other images in each process. Those of the first process are saved.
    model = tiny_model(box_head="map", frozen_batch_norm=False)
    arguments = {"train_dataset": train, "processing_class": tiny_processor()}
    normed = EpmVGTrainer(model, args, **arguments)
    normed.train()
    evaluated = normed.predict(dataset).predictions
    normed.save_model()
    args.distributed_state.wait_for_everyone()
    saved_model = EpmVGForVisualGrounding.from_pretrained(folder)
    saved = EpmVGTrainer(saved_model, args, **arguments).predict(dataset).predictions

    long = [train_long(folder, 2 * batch_size, images) for images in (37, 39)]
    if trainer.is_world_process_zero():
        log = trainer.state.log_history[0]
        result = {
            "processes": args.world_size,
            "log": {name: log[name] for name in ("loss", "grad_norm", "loss_bbox", "loss_giou", "loss_map")},
            "predictions": output.predictions.tolist(),
            "references": output.label_ids.tolist(),
            "metrics": metrics,
            "evaluated": evaluated.tolist(),
            "saved": saved.tolist(),
            "long": long,
        }
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
