"""One optimizer step per term of the distillation, for `test_distillation.py` to run on one and on two processes."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor, uneven_shapes
from tests.fixtures.tiny_teacher import TinyTeacher

COEFFICIENTS = ("relation_loss_coefficient", "feature_loss_coefficient", "teacher_map_loss_coefficient")
NONE = dict.fromkeys(COEFFICIENTS, 0.0)
RUNS = {
    "relation": NONE | {"relation_loss_coefficient": 1.0},
    "feature": NONE | {"feature_loss_coefficient": 1.0},
    "teacher_map": NONE | {"teacher_map_loss_coefficient": 1.0},
    "all": dict.fromkeys(COEFFICIENTS, 1.0),
    "all, cached": dict.fromkeys(COEFFICIENTS, 1.0) | {"cache_teacher": True},
}


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer will see, averaged over the processes."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {
            name.removeprefix("module."): parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def sharded_gradients(trainer: EpmVGTrainer) -> dict[str, torch.Tensor]:
    """The gradients of the first batch, with the student's parameters spread over the processes by FSDP2."""
    ((batch,), totals) = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    model = trainer.model
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model)
    trainer.compute_loss(model, batch, num_items_in_batch=totals).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def zero2_gradients(folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    """What DeepSpeed, which shards the gradients away, subtracts from the parameters in a step of plain SGD."""
    zero2 = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    changes = {"deepspeed": zero2, "optim": "sgd", "learning_rate": 1.0}
    trainer, _ = make_trainer(folder, batch_size, RUNS["all"] | changes)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.is_deepspeed_enabled
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def main(folder: Path, batch_size: int, with_deepspeed: bool):
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    logs = {}
    for run, changes in RUNS.items():
        trainer, callback = make_trainer(folder, batch_size, changes)
        trainer.train()
        if trainer.is_world_process_zero():
            log = trainer.state.log_history[0]
            logs[run] = {name: value for name, value in log.items() if "loss" in name or name == "grad_norm"}
            save_file(callback.gradients, folder / f"{run}.safetensors")
    processes = trainer.args.world_size
    if processes > 1:
        trainer, _ = make_trainer(folder, batch_size, RUNS["all"])
        gradients = sharded_gradients(trainer)
        if trainer.is_world_process_zero():
            save_file(gradients, folder / "all, sharded.safetensors")
    if with_deepspeed:
        gradients = zero2_gradients(folder, batch_size)
        if trainer.is_world_process_zero():
            save_file(gradients, folder / "all, zero2.safetensors")
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps({"processes": processes, "logs": logs}))
    trainer.accelerator.end_training()


def make_trainer(folder: Path, batch_size: int, changes: dict[str, Any]) -> tuple[EpmVGTrainer, Gradients]:
    args = EpmVGTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_grad_norm=0.0,
        **{**ONE_STEP, "cache_teacher": False, **changes},
    )
    with args.main_process_first():
        dataset = uneven_shapes([8, 1, 5, 2])
    captioned = load_grounding_dataset("shapes", split="validation", num_images=4).remove_columns("box")
    callback = Gradients()
    trainer = EpmVGTrainer(
        tiny_model(box_head="map", frozen_batch_norm=True, teacher_projection_dim=24),
        args,
        train_dataset=dataset,
        processing_class=tiny_processor(),
        teacher=TinyTeacher(),
        caption_dataset=captioned,
        callbacks=[callback],
    )
    return trainer, callback


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "deepspeed" in sys.argv[3:])
