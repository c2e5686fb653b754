"""Says in one sentence what [`EpmVGTrainer`] cannot work with, before anything is built from it."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, IterableDataset
from torch import nn
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import unwrap_peft_model

from ..model.pipeline_visual_grounding import is_named
from .model_card import METRICS
from .training_args import EpmVGTrainingArguments

# Arguments of `Trainer` that would do nothing, and what there is instead.
_REFUSED = {
    "compute_loss_func": "override compute_loss instead",
    "data_collator": "its own one makes batches, from processing_class, augmentation and args",
    "preprocess_logits_for_metrics": "compute_metrics gets boxes in pixels of the original images, not logits",
}


def check_trainer(
    model: Any, args: Any, processing_class: Any, data: Mapping[str, Any], others: Mapping[str, Any]
) -> None:
    """
    Raises a `ValueError` for what is not what [`EpmVGTrainer`] needs, or contradicts another of its arguments.

    Args:
        model: should be an [`EpmVGForVisualGrounding`], with or without a `PeftModel`, or `None` with `model_init`.
        args: should be [`EpmVGTrainingArguments`].
        processing_class: should be an [`EpmVGProcessor`].
        data (`Mapping[str, Any]`):
            `train_dataset`, `eval_dataset` and `caption_dataset`, which should be datasets or `None`; the second may
            be a dictionary of datasets.
        others (`Mapping[str, Any]`): further arguments of `transformers.Trainer`.
    """
    if not isinstance(args, EpmVGTrainingArguments):
        raise ValueError(f"args must be EpmVGTrainingArguments, which add those of grounding, {_got(args)}")
    if processing_class is None:
        raise ValueError("EpmVGTrainer needs processing_class, an EpmVGProcessor: it makes the model's inputs")
    if not is_named(processing_class, "EpmVGProcessor"):
        raise ValueError(
            "processing_class must be an EpmVGProcessor, which reads images and expressions alike, "
            f"{_got(processing_class)}"
        )
    if model is not None:
        check_student(model)
    for name, dataset in data.items():
        if name == "eval_dataset" and isinstance(dataset, dict):
            for split, part in dataset.items():
                check_dataset(f"eval_dataset[{split!r}]", part)
        elif dataset is not None:
            check_dataset(name, dataset)
    if "compute_metrics" not in others:
        _check_best_metric(args, data["eval_dataset"])
    for name, instead in _REFUSED.items():
        if others.get(name) is not None:
            raise ValueError(f"EpmVGTrainer takes no {name}: {instead}")
    _check_optimizers(args, others.get("optimizers", (None, None)), others.get("optimizer_cls_and_kwargs"))


def _check_optimizers(args: EpmVGTrainingArguments, optimizers: Any, optimizer_cls_and_kwargs: Any) -> None:
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        raise ValueError(f"optimizers must be a pair of optimizer and schedule, {_got(optimizers)}")
    optimizer, schedule = optimizers
    for part, name in (
        (optimizer, "vision_learning_rate"),
        (optimizer, "text_learning_rate"),
        (schedule, "lr_drop_epochs"),
    ):
        if part is not None and getattr(args, name) is not None:
            raise ValueError(f"optimizers bring learning rates of their own: {name} must be None")
    pair = optimizer_cls_and_kwargs
    if pair is not None and (not isinstance(pair, tuple | list) or len(pair) != 2 or is_optimizer_factory(pair[0])):
        raise ValueError(f"optimizer_cls_and_kwargs must be a pair of an optimizer's class and a dict, {_got(pair)}")


def check_student(model: Any) -> None:
    """
    Raises a `ValueError` if a model is none that grounds expressions.

    Args:
        model: should be an [`EpmVGForVisualGrounding`], which may be compiled or stand in a `PeftModel`.
    """
    student = model
    if isinstance(model, nn.Module):
        student = unwrap_peft_model(extract_model_from_parallel(model, keep_torch_compile=False))
    if not is_named(student, "EpmVGForVisualGrounding"):
        raise ValueError(f"model must be an EpmVGForVisualGrounding, or a PeftModel around one, {_got(model)}")


def check_dataset(name: str, dataset: Any) -> None:
    """
    Raises a `ValueError` if something is no dataset of 🤗 datasets.

    Args:
        name (`str`): the argument that it was given as.
        dataset: should be a `datasets.Dataset` or a `datasets.IterableDataset`.
    """
    if isinstance(dataset, Dataset | IterableDataset):
        return
    advice = ""
    if isinstance(dataset, Mapping):
        advice = f": take one of its splits: {', '.join(map(str, dataset))}"
    elif isinstance(dataset, list):
        advice = ": Dataset.from_list makes one of dictionaries"
    raise ValueError(f"{name} must be a datasets.Dataset or datasets.IterableDataset, {_got(dataset)}{advice}")


def _check_best_metric(args: EpmVGTrainingArguments, eval_dataset: Any) -> None:
    """transformers would notice only at the first evaluation that there is no such metric."""
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no":
        return
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    metrics = ["loss"] if args.prediction_loss_only else [*METRICS, "loss"]
    name = metric.removeprefix("eval_")
    known = [prefix + metric for prefix in prefixes for metric in metrics]
    if name not in known and not any(name.startswith(f"{prefix}loss_") for prefix in prefixes):
        raise ValueError(
            f"metric_for_best_model is {metric!r}, and an evaluation gives {', '.join(known)} and the terms of the "
            "loss"
        )


def _got(value: Any) -> str:
    return f"got {'None' if value is None else 'a ' + type(value).__name__}"
