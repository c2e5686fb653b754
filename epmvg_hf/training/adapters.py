"""PEFT adapters on a model, those of `peft.get_peft_model` and those of the model's own `add_adapter`."""

import os

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model


def has_own_adapter(model: nn.Module) -> bool:
    """Whether the model carries an adapter itself, by `add_adapter` or `load_adapter`, and is in no `PeftModel`."""
    return isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has an adapter, so that saving it saves that alone."""
    return unwrap_peft_model(model) is not model or has_own_adapter(model)


def load_adapter_weights(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """
    Loads an adapter's saved weights into the active adapter of a model for which [`has_own_adapter`] holds. The
    parameters stay the same objects, trained or frozen as they were; `load_adapter` would add an adapter beside it.

    Args:
        model (`PreTrainedModel`): the model.
        folder (`str` or `os.PathLike`): where the adapter was saved.
    """
    from peft import load_peft_weights, set_peft_model_state_dict  # here: only who has an adapter has peft

    (adapter_name,) = model.active_adapters()
    weights = load_peft_weights(os.fspath(folder), device=str(model.device))
    # Saved as if the model were in a PeftModel.
    weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
