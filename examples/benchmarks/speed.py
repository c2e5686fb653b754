"""Our student against its rivals: latency, throughput, a training step, peak memory, and the floor of each."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import TRANSVG, Contender, make_contenders
from memory import peak_megabytes
from profiles import write_profile
from timing import Action, MatrixProduct, count_operations, take_turns
from torch import nn
from tqdm.auto import tqdm


class Use(NamedTuple):
    """What is done with the models, where, and how precisely."""

    training: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "training step" if self.training else "inference"


class Case(NamedTuple):
    """A contender that is given a number of expressions at a time."""

    contender: Contender
    expressions: int


def measure(
    device: torch.device,
    quick: bool,
    output: Path,
    dtype: torch.dtype = torch.float32,
    repeats: int | None = None,
    profile: bool = False,
) -> list[dict[str, Any]]:
    """
    Measures inference of all contenders, and then a training step of those that have one.

    Args:
        device (`torch.device`): where the models run; on a GPU they are compiled.
        quick (`bool`): whether to take tiny models and one repeat.
        output (`Path`): folder for the profiles.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): the precision of all models. Training keeps its
            weights in float32, and computes in another precision under autocast.
        repeats (`int`, *optional*): how often the contenders take turns; without it 5 times, and 50 times on a GPU.
        profile (`bool`, *optional*, defaults to `False`): whether to write profiles of the student.

    Returns:
        `list[dict]`: a row for each case. "of TransVG's" compares the time of an expression with that of the TransVG
        equivalent when it is given as many expressions, or the most below that. "times its floor" compares the time
        with that of the counted operations at the speed of a matrix product, which takes turns with the models. "peak
        MB" includes the model, and in training its gradients and the optimizer; on a GPU it is that before compiling.
    """
    if repeats is None:
        repeats = 1 if quick else 50 if device.type == "cuda" else 5
    contenders = make_contenders(quick)
    inference = [Case(contender, expressions) for contender in contenders for expressions in contender.inference]
    training = [Case(contender, expressions) for contender in contenders for expressions in contender.training]
    product, profiles = MatrixProduct(device, dtype, quick), output if profile else None
    return [
        *measure_cases(inference, Use(False, device, dtype), product, repeats, profiles),
        *measure_cases(training, Use(True, device, dtype), product, repeats, profiles),
    ]


def measure_cases(
    cases: list[Case], use: Use, product: MatrixProduct, repeats: int, profiles: Path | None
) -> list[dict[str, Any]]:
    """The rows of these cases, and one of the matrix product."""
    megabytes = {
        case: peak_megabytes(partial(load_and_make_action, case, use), use.device)
        for case in tqdm(cases, desc=f"memory of {use.name}")
    }
    models = {contender: load(contender, use) for contender in dict.fromkeys(case.contender for case in cases)}
    actions: dict[Case | str, Action] = {case: make_action(case, use, models[case.contender]) for case in cases}
    operations = {case: count_operations(actions[case]) for case in tqdm(cases, desc=f"operations of {use.name}")}
    if use.device.type == "cuda":
        for model in models.values():
            model.compile(dynamic=False)
    actions["product"] = product
    for action in actions.values():
        action()  # The first time, kernels are chosen or compiled.
    seconds = take_turns(actions, use.device, repeats)
    if profiles is not None:
        for case in cases:
            if case.contender.name.startswith("student"):
                words = f"profile {use.name} {case.contender.name} {case.expressions}".replace(",", "").split()
                write_profile(profiles / f"{'-'.join(words)}.txt", actions[case], use.device)

    rows: list[dict[str, Any]] = []
    for case in cases:
        transvg = max(
            (other for other in cases if other.contender.name == TRANSVG and other.expressions <= case.expressions),
            key=lambda other: other.expressions,
        )
        same = transvg.expressions == case.expressions
        an_expression = seconds[case] / case.expressions
        floor = operations[case] / product.operations * seconds["product"]
        pictures, _, height, width = case.contender.make_inputs(case.expressions)["pixel_values"].shape
        row = {
            use.name: case.contender.name,
            "pictures": f"{pictures} of {width} x {height}",
            "expressions": case.expressions,
            "ms": 1e3 * seconds[case],
            "expressions/s": 1 / an_expression,
            "ms an expression": 1e3 * an_expression,
            "of TransVG's": an_expression / (seconds[transvg] / transvg.expressions),
            "GFLOP": operations[case] / 1e9,
            "times its floor": seconds[case] / floor,
            "peak MB": megabytes[case],
            "peak of TransVG's": megabytes[case] / megabytes[transvg] if same else None,
        }
        rows.append(row)
    speed = product.operations / seconds["product"] / 1e9
    return [*rows, {"matrix product": f"{product.side} x {product.side}", "GFLOP/s": speed}]


def load(contender: Contender, use: Use) -> nn.Module:
    """The contender's model, with the same random weights each time."""
    torch.manual_seed(0)
    model = contender.make_model().to(use.device)
    return model.train() if use.training else model.eval().to(use.dtype)


def load_and_make_action(case: Case, use: Use) -> Action:
    return make_action(case, use, load(case.contender, use))


def make_action(case: Case, use: Use, model: nn.Module) -> Action:
    """What is measured: the model's outputs, or a step of training."""
    inputs = {name: tensor.to(use.device) for name, tensor in case.contender.make_inputs(case.expressions).items()}
    if use.training:
        labels = torch.tensor([0.5, 0.5, 0.4, 0.2], device=use.device).repeat(case.expressions, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        return partial(train, model, optimizer, {**inputs, "labels": labels}, use)
    inputs["pixel_values"] = inputs["pixel_values"].to(use.dtype)
    return partial(infer, model, inputs)


@torch.inference_mode()
def infer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor], use: Use) -> None:
    with torch.autocast(use.device.type, use.dtype, enabled=use.dtype != torch.float32):
        loss = model(**inputs)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
