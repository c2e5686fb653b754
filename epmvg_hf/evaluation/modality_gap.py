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
"""The distance between the embeddings of images and those of expressions in their common space."""

import torch
from torch import nn


@torch.no_grad()
def modality_gap(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_index: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """
    The modality gap (Liang et al. 2022, "Mind the Gap"), and the cosine similarities by which matching pairs of image
    and expression can be told from other pairs in spite of the gap.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, e)`):
            Embeddings of the images. They are L2-normalised here, and each image counts once, however many
            expressions it has.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`): embeddings of the expressions, which are normalised too.
        image_index (`torch.LongTensor` of shape `(N,)`, *optional*):
            Image of each expression. Without it, N = B and the n-th expression is about the n-th image.

    Returns:
        `dict[str, torch.FloatTensor]` of float32 scalars: `gap`, the Euclidean distance in [0, 2] between the centroid
        of the images and that of the expressions; `alignment`, the mean cosine similarity of an expression with its
        own image; `mismatch`, the mean cosine similarity of an expression with another image (NaN for one image).

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.evaluation.modality_gap import modality_gap

    >>> modality_gap(torch.eye(2), torch.eye(2))
    {'gap': tensor(0.), 'alignment': tensor(1.), 'mismatch': tensor(0.)}
    ```
    """
    images, texts = (nn.functional.normalize(embeds.float(), dim=-1) for embeds in (image_embeds, text_embeds))
    own_images = images if image_index is None else images[image_index]
    matching = (own_images * texts).sum()
    # The sum of all pairs' cosines is the product of the sums, which needs no B x N matrix.
    all_pairs = (images.sum(0) * texts.sum(0)).sum()
    return {
        "gap": torch.linalg.vector_norm(images.mean(0) - texts.mean(0)),
        "alignment": matching / len(texts),
        "mismatch": (all_pairs - matching) / ((len(images) - 1) * len(texts)),
    }


@torch.no_grad()
def modality_probe(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_index: torch.Tensor | None = None
) -> float:
    """
    How well a linear classifier tells embeddings of images from those of expressions: a linear probe (Alain & Bengio
    2016, "Understanding intermediate layers using linear classifier probes"). It is learned on every second image and
    its expressions and tested on the others, and the other way round. Both modalities count the same, however many
    expressions there are. The classifier is that of regularised least squares with a bias.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, e)`): embeddings of at least 2 images; normalised here.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`): embeddings of the expressions, which are normalised too.
        image_index (`torch.LongTensor` of shape `(N,)`, *optional*):
            Image of each expression. Without it, N = B and the n-th expression is about the n-th image.

    Returns:
        `float`: the share that it tells rightly, the mean of both modalities; 0.5 if they cannot be told apart.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.evaluation.modality_gap import modality_probe

    >>> images = torch.randn(40, 8)
    >>> modality_probe(images + 9, images - 9)
    1.0
    ```
    """
    images, texts = (nn.functional.normalize(embeds.double(), dim=-1) for embeds in (image_embeds, text_embeds))
    of_image = torch.arange(len(images), device=images.device)
    embeds = torch.cat([images, texts])
    is_first = torch.cat([of_image, of_image if image_index is None else image_index]) % 2 == 0
    sides = torch.cat([torch.ones(len(images)), -torch.ones(len(texts))]).to(embeds)
    rights = []
    for trained in (is_first, ~is_first):
        normal = _fit_least_squares(embeds[trained], sides[trained])
        tested = embeds[~trained]
        right = (_with_bias(tested) @ normal).sign() == sides[~trained]
        rights += [right[sides[~trained] == side].double().mean() for side in (1, -1)]
    return torch.stack(rights).mean().item()


def _fit_least_squares(embeds: torch.Tensor, sides: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """The plane, not only one through 0, that tells `sides` of 1 from those of -1, both of which weigh the same."""
    points = _with_bias(embeds)
    weights = torch.where(sides > 0, 1 / (sides > 0).sum(), 1 / (sides < 0).sum())
    weighted = points * weights[:, None]
    identity = torch.eye(points.shape[1]).to(points)
    return torch.linalg.solve(weighted.T @ points + ridge * identity, weighted.T @ sides)


def _with_bias(points: torch.Tensor) -> torch.Tensor:
    return torch.cat([points, torch.ones(len(points), 1).to(points)], dim=1)
