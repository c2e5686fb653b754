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
