"""Decides which parameters are trained, at which learning rates, and when the rates drop."""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .training_args import EpmVGTrainingArguments

# The projection behind the encoder is not listed: TransVG trains it at the fusion transformer's rate.
_VISION_MODULES = ("vision_model", "input_projection", "encoder")


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """
    Takes parameters out of training.

    Args:
        model (`nn.Module`): the student.
        patterns (`Sequence[str]`): regular expressions, searched in the names of parameters.

    Raises:
        ValueError: a pattern matches no name.
    """
    for pattern in patterns:
        matching = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matching:
            raise ValueError(f"frozen_parameters has {pattern!r}, which is found in no parameter's name")
        for parameter in matching:
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, args: EpmVGTrainingArguments, decayed: Collection[str]) -> list[dict[str, Any]]:
    """
    Puts the trained parameters into groups with one learning rate and one weight decay each.

    Args:
        model (`nn.Module`): the student, or the student with an adapter.
        args ([`EpmVGTrainingArguments`]): gives the rates of vision backbone and encoder, text tower, and the rest.
        decayed (`Collection[str]`): names of the parameters that weight decay applies to.

    Returns:
        `list[dict]`: the parameter groups of a `torch.optim.Optimizer`.
    """
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_learning_rate_of(name, args), name in decayed].append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": args.weight_decay if decay else 0.0}
        for (lr, decay), parameters in groups.items()
    ]


def _learning_rate_of(parameter_name: str, args: EpmVGTrainingArguments) -> float:
    modules = parameter_name.split(".")
    rate = None
    if "text_model" in modules:
        rate = args.text_learning_rate
    elif any(name in modules for name in _VISION_MODULES):
        rate = args.vision_learning_rate
    return args.learning_rate if rate is None else rate


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
