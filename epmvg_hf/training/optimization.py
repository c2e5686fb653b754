"""Decides which parameters are trained, at which learning rates, and when the rates drop."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME

from ..model.modeling_epmvg import EpmVGForVisualGrounding
from .training_args import EpmVGTrainingArguments

# The projection behind the encoder is not listed: TransVG trains it at the fusion transformer's rate.
_ENCODER_MODULES = ("input_projection", "input_projection_norm", "encoder")


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """
    Takes parameters out of training.

    Args:
        model (`nn.Module`): the student.
        patterns (`Sequence[str]`): regular expressions, searched in the names of parameters.

    Raises:
        ValueError: a pattern matches no name, or nothing is left to train.
    """
    for pattern in patterns:
        matching = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matching:
            raise ValueError(f"frozen_parameters has {pattern!r}, which is found in no parameter's name")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"frozen_parameters {list(patterns)} leaves no parameter to train")


def find_unused_parameters(
    model: EpmVGForVisualGrounding, with_embeddings: bool, skip_fusion: bool = False
) -> list[str]:
    """
    The names of trained parameters that get no gradient, such as those of stages behind the last feature map that is
    used. Runs the student once, for one empty image.

    Args:
        model ([`EpmVGForVisualGrounding`]): the student.
        with_embeddings (`bool`): whether the loss compares the student's `image_embeds` and `text_embeds`.
        skip_fusion (`bool`, *optional*, defaults to `False`): whether nothing behind the `similarity_map` is trained.

    Example:

    ```python
    >>> from epmvg_hf.training.optimization import find_unused_parameters

    >>> find_unused_parameters(model, with_embeddings=False)
    ['model.teacher_image_projection.weight', 'model.teacher_text_projection.weight']
    ```
    """
    size = model.config.image_size
    was_training = model.training
    # In training mode, dropout would draw random numbers and batch norms would change.
    outputs = model.eval()(
        pixel_values=torch.zeros(1, 3, size, size, device=model.device),
        input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device),
        labels=torch.full((1, 4), 0.5, device=model.device),
        skip_fusion=skip_fusion,
    )
    model.train(was_training)
    end = outputs.similarity_map if skip_fusion else outputs.loss
    ends = [end, *((outputs.image_embeds, outputs.text_embeds) if with_embeddings else ())]
    nodes = [end.grad_fn for end in ends if end.grad_fn is not None]
    seen, used = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::AccumulateGrad":  # where the graph ends at a parameter
            used.add(node.variable)
        following = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= following
        nodes.extend(following)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter not in used]


def parameter_groups(model: nn.Module, args: EpmVGTrainingArguments, decayed: Collection[str]) -> list[dict[str, Any]]:
    """
    Puts the trained parameters into groups with one learning rate and one weight decay each.

    Args:
        model (`nn.Module`): the student, or the student with an adapter.
        args ([`EpmVGTrainingArguments`]): gives the rates of vision backbone, encoder, text tower, and the rest.
        decayed (`Collection[str]`): names of the parameters that weight decay applies to.

    Returns:
        `list[dict]`: the parameter groups of a `torch.optim.Optimizer`, with the names of the parameters, which its
        state then holds too.
    """
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_learning_rate_of(name, args), name in decayed].append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "param_names": [name for name, _ in members],
            "lr": lr,
            "weight_decay": args.weight_decay if decay else 0.0,
        }
        for (lr, decay), members in groups.items()
    ]


def _learning_rate_of(parameter_name: str, args: EpmVGTrainingArguments) -> float:
    modules = parameter_name.split(".")
    rate = None
    if "text_model" in modules:
        rate = args.text_learning_rate
    elif "vision_model" in modules:
        rate = args.vision_learning_rate
    elif any(name in modules for name in _ENCODER_MODULES):
        rate = args.vision_learning_rate if args.encoder_learning_rate is None else args.encoder_learning_rate
    return args.learning_rate if rate is None else rate


def check_resumable(checkpoint: str | os.PathLike, groups: Sequence[dict[str, Any]]) -> None:
    """
    Compares the parameter groups of a run with those of the checkpoint that it is to go on from. The optimiser's state
    fits the same parameters only, and the saved learning rates and weight decays would silently replace other ones.

    Args:
        checkpoint (`str` or `os.PathLike`): the folder. Without an optimiser's state there is nothing to compare.
        groups (`Sequence[dict]`): the parameter groups of this run.

    Raises:
        ValueError: the parameters, their learning rates or their weight decays differ.
    """
    file = Path(checkpoint) / OPTIMIZER_NAME
    if not file.is_file():
        return
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
    before, now = (sum(len(group["params"]) for group in run) for run in (saved, groups))
    # Optimisers that the user made, and checkpoints of older versions, have no names.
    names = [{name for group in run for name in group.get("param_names", ())} for run in (saved, groups)]
    changed = sorted(names[0] ^ names[1]) if all(names) else []
    if before != now or changed:
        example = f", and only one of them trains {changed[0]}" if changed else ""
        raise ValueError(
            f"{checkpoint} cannot be resumed: it trained {before} parameters and this run trains {now}{example}: "
            "restore frozen_parameters, the adapter and the terms of the teacher's loss, or start a new run from its "
            "weights"
        )
    for what, key, arguments in (
        # The rate at the start, because the schedule changes the other. reduce_lr_on_plateau keeps no such rate.
        ("learning rates", "initial_lr", "learning_rate, vision_learning_rate and text_learning_rate"),
        ("weight decays", "weight_decay", "weight_decay"),
    ):
        if all(key in group for group in saved):
            old, new = ([(float(g.get(key, g["lr"])), len(g["params"])) for g in run] for run in (saved, groups))
            if old != new:
                raise ValueError(
                    f"{checkpoint} cannot be resumed: its {what} are {_list(old)}, and those of this run "
                    f"{_list(new)}: restore {arguments}, or start a new run from its weights"
                )


def _list(values: Sequence[tuple[float, int]]) -> str:
    return ", ".join(f"{value:g} (of {number} parameters)" for value, number in values)


def drop_schedule(
    optimizer: Optimizer, drop_epochs: Sequence[float], args: EpmVGTrainingArguments, num_training_steps: int
) -> LambdaLR:
    """
    Divides all learning rates by 10 after each of `drop_epochs`, as TransVG does, after a linear warmup if there is
    one.

    Args:
        optimizer (`torch.optim.Optimizer`): the optimiser.
        drop_epochs (`Sequence[float]`): the epochs after which the rates drop.
        args ([`EpmVGTrainingArguments`]): gives the numbers of epochs and of warmup steps.
        num_training_steps (`int`): number of optimiser steps of the whole run.
    """
    steps_per_epoch = num_training_steps / args.num_train_epochs
    drops = [round(epoch * steps_per_epoch) for epoch in drop_epochs]
    warmup = args.get_warmup_steps(num_training_steps)

    def factor(step: int) -> float:
        warmed_up = min(1.0, step / warmup) if warmup else 1.0
        return warmed_up * 0.1 ** sum(step >= drop for drop in drops)

    return LambdaLR(optimizer, factor)
