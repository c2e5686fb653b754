"""
Recognises the PEFT adapters of a model and loads their weights.

There are two kinds: `peft.get_peft_model` wraps the model in a `PeftModel`, which the Trainer of transformers supports
fully, and `add_adapter` of the model puts the adapter into the model itself, which the Trainer supports only in part.
"""

import os

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model


def has_own_adapter(model: nn.Module) -> bool:
    """Whether the model itself has an adapter, from `add_adapter` or `load_adapter`, and is not in a `PeftModel`."""
    return isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has an adapter of either kind. Saving such a model saves only the adapter."""
    return unwrap_peft_model(model) is not model or has_own_adapter(model)


def load_adapter_weights(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """
    Loads the saved weights of an adapter into the active adapter of a model that has its own adapter.

    The parameters stay the same objects, as the optimizer needs them. `load_adapter` of transformers would instead add
    a second adapter.

    Args:
        model (`PreTrainedModel`): a model for which [`has_own_adapter`] is true.
        folder (`str` or `os.PathLike`): the folder that the adapter was saved in.
    """
    from peft import load_peft_weights, set_peft_model_state_dict  # an extra that only adapters need

    (adapter_name,) = model.active_adapters()
    weights = load_peft_weights(os.fspath(folder), device=str(model.device))
    # transformers saves the adapter with the names that its weights would have in a PeftModel.
    weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
