# Copyright 2026 The EpmVG HF authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Batch norms folded into the convolutions before them, for inference."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def fold_batch_norms(model: nn.Module, pixel_values: torch.Tensor) -> int:
    """
    Folds the batch norms of a convolutional network into the convolutions before them, in place.

    Args:
        model (`nn.Module`): the network, in evaluation mode.
        pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`): any input. One run with it shows which batch
            norm reads the output of which convolution.

    Returns:
        `int`: how many batch norms were folded. Those that do not directly follow a convolution stay as they are.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from epmvg_hf.model.folded_batch_norm import fold_batch_norms

    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> fold_batch_norms(network, torch.zeros(1, 3, 8, 8))
    1
    ```
    """
    pairs = _pairs(model, pixel_values)
    names = {module: name for name, module in model.named_modules()}
    for convolution, norm in pairs:
        assert norm.running_mean is not None and norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.weight.copy_(weight)
        saved_bias = bias.detach().clone()
        if convolution.bias is None:
            # The state dict of a convolution without a bias must not get one: the norm keeps it there.
            del convolution.bias
            convolution.register_buffer("bias", bias.detach(), persistent=False)
        else:
            convolution.bias.copy_(bias)
            saved_bias.zero_()
        model.set_submodule(names[norm], FoldedBatchNorm(norm, saved_bias))
    return len(pairs)


class FoldedBatchNorm(nn.Module):
    """
    Stands in the place of a batch norm whose work is done by the convolution before it.

    Its parameters and buffers are those of a batch norm that does nothing but add the bias that the convolution got.
    So a folded model is saved under the names that it had before, and a model that loads it computes the same.

    Args:
        norm (`nn.BatchNorm2d`): the batch norm that is replaced.
        bias (`torch.Tensor` of shape `(channels,)`): what the batch norm in the saved model must add.
    """

    def __init__(self, norm: nn.BatchNorm2d, bias: torch.Tensor):
        super().__init__()
        assert norm.running_mean is not None
        ones = torch.ones_like(norm.running_mean)
        self.weight = nn.Parameter((ones + norm.eps).sqrt(), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("running_mean", torch.zeros_like(ones))
        self.register_buffer("running_var", ones)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        self.activation = _activation(norm)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.activation(features)


def _pairs(model: nn.Module, pixel_values: torch.Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each convolution whose output a batch norm reads, with that batch norm, as one run of the model shows them."""
    outputs: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # with the tensors, because ids are used again
    pairs = []

    def keep_output(convolution: nn.Module, _inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(convolution, nn.Conv2d)
        outputs[id(output)] = (convolution, output)

    def find_source(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], norm))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(keep_output))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(find_source))
    model(pixel_values)
    for hook in hooks:
        hook.remove()
    return pairs


def _activation(norm: nn.BatchNorm2d) -> nn.Module:
    """What a batch norm does after normalising: nothing in PyTorch, an activation in timm's `BatchNormAct2d`."""
    try:
        from timm.layers import BatchNormAct2d
    except ImportError:  # then there is none in the model either
        return nn.Identity()
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
