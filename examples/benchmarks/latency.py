"""Time of a call of the pipeline on one picture that lies in memory, with one expression and with eight."""

from typing import Any

import torch
from contenders import EXPRESSIONS, load_or_make_student, make_picture
from timing import take_turns
from transformers import pipeline

import epmvg_hf  # noqa: F401 (registers the task)


def measure(
    device: torch.device, quick: bool, model_name: str | None = None, repeats: int | None = None
) -> list[dict[str, Any]]:
    """
    Args:
        device (`torch.device`): where the model runs.
        quick (`bool`): whether to take a tiny model.
        model_name (`str`, *optional*): folder or Hub name of a trained model, instead of random weights.
        repeats (`int`, *optional*): how often both take turns; without it 20 times.

    Returns:
        `list[dict]`: a row for each number of expressions.
    """
    model, processor = load_or_make_student(model_name, quick)
    grounder = pipeline("visual-grounding", model=model, processor=processor, device=device)
    picture = make_picture(0)
    texts = {count: [EXPRESSIONS[number % len(EXPRESSIONS)] for number in range(count)] for count in (1, 8)}
    actions = {count: lambda text=text: grounder(picture, text) for count, text in texts.items()}
    for action in actions.values():
        action()
    seconds = take_turns(actions, device, repeats or 20)
    return [
        {"picture": f"{picture.width} x {picture.height}", "expressions": count, "ms": 1e3 * taken}
        for count, taken in seconds.items()
    ]
