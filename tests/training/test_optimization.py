"""Which parameters are trained."""

import torch

from epmvg_hf.training.optimization import find_unused_parameters, freeze_parameters
from tests.fixtures.models import tiny_config, tiny_model


def test_parameters_without_a_gradient_are_found():
    assert find_unused_parameters(tiny_model(), with_embeddings=False) == []
    assert find_unused_parameters(tiny_model(teacher_projection_dim=24), with_embeddings=True) == []

    backbone = {**tiny_config().backbone_config.to_dict(), "out_features": ["stage1"], "out_indices": None}
    model = tiny_model(backbone_config=backbone, backbone_stride=4, frozen_batch_norm=True, dropout=0.5).train()
    state = torch.get_rng_state()
    unused = find_unused_parameters(model, with_embeddings=False)
    assert unused and all("vision_model.encoder.stages.1" in name for name in unused)
    # The search leaves no traces.
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    freeze_parameters(model, [r"encoder\.stages\.1"])
    assert find_unused_parameters(model, with_embeddings=False) == []
