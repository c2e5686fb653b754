"""The model that commands ground with."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

import epmvg_hf

if TYPE_CHECKING:
    from ..model.pipeline_visual_grounding import VisualGroundingPipeline

# Of a checkout of the repository. An installed package has no weights.
SHIPPED_MODEL = Path(__file__).parents[2] / "model_cards" / "epmvg-small-flickr30k"


def load_grounder(model: str | None, device: str | None) -> "VisualGroundingPipeline":
    """
    The pipeline of a model.

    Args:
        model (`str`, *optional*): folder or Hub id; by default the small model of a checkout of the repository.
        device (`str`, *optional*): such as `"cuda:0"`; an accelerator by default, if there is one.

    Raises:
        typer.BadParameter: there is no such model.
    """
    if model is None:
        if not SHIPPED_MODEL.is_dir():
            raise typer.BadParameter(
                "name a model: a folder or a Hub id (of a checkout of the repository, its small one is the default)"
            )
        model = str(SHIPPED_MODEL)
    check_model(model)
    epmvg_hf.register()
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    return pipeline("visual-grounding", model=model, device=device)


def check_model(model: str) -> None:
    """
    Says in a moment that there is no such model. Otherwise each of its files is sought on the Hub, which takes minutes
    where there is no network.
    """
    if Path(model).is_dir():
        return
    owner = Path(model).parts[0]
    if model.count("/") != 1 or owner in (".", "..", "~") or Path(owner).exists():
        raise typer.BadParameter(f"there is no folder {model}, and it is no id of the Hub (owner/name)")
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    try:
        HfApi().model_info(model, timeout=10)
    except Exception as error:  # the clients of several versions raise different kinds
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"{model} is no folder here, and the Hub does not give it ({reason})") from error
