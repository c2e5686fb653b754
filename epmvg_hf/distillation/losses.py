"""The terms of the loss that compare the student with the teacher. No gradient reaches the teacher."""

import torch
from torch import nn

from ..model.feature_grid import only_on_picture


@torch.no_grad()
def teacher_map_target(
    patch_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_index: torch.Tensor | None,
    visual_mask: torch.Tensor,
    temperature: float | torch.Tensor,
) -> torch.Tensor:
    """
    Computes where the teacher finds an expression in its image, as a distribution over the student's grid: the cosines
    of the expression with all patches, resized to the grid, then a softmax over positions. The cosines are the
    score map of DenseCLIP (raoyongming/DenseCLIP: segmentation/denseclip/denseclip.py), which MaskCLIP (Zhou et al.
    2022, "Extract Free Dense Labels from CLIP") takes from CLIP without training. Both compare several classes at one
    position; comparing several positions for one expression is our reading of EpmVG.

    Args:
        patch_embeds (`torch.FloatTensor` of shape `(B, h, w, e)`):
            The teacher's patches, L2-normalised. Their grid covers the student's canvas, padding included.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`): the teacher's expressions, L2-normalised.
        image_index (`torch.LongTensor` of shape `(N,)` or `None`):
            The image of each expression. With `None`, expression i is about image i, and N = B.
        visual_mask (`torch.BoolTensor` of shape `(N, grid_height, grid_width)`): False on padding.
        temperature (`float`): divisor of the cosines.

    Returns:
        `torch.FloatTensor` of shape `(N, grid_height * grid_width)`: 0 on padding; rows sum to 1, or to 0 if the whole
        row is padding.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.distillation.losses import teacher_map_target

    >>> patches, words = torch.eye(2).view(1, 1, 2, 2), torch.tensor([[1.0, 0.0]])  # the words fit the first patch
    >>> teacher_map_target(patches, words, None, torch.ones(1, 1, 2, dtype=torch.bool), temperature=0.5)
    tensor([[0.8808, 0.1192]])
    ```
    """
    # Every expression is compared with all images, and only the scores of its own image are kept. That is more work
    # than needed, but copying the patches of an image for each of its expressions takes longer and far more memory.
    scores = _float32_product(patch_embeds.flatten(0, 2), text_embeds.T).unflatten(0, patch_embeds.shape[:3])
    expressions = torch.arange(len(text_embeds), device=scores.device)
    scores = scores[expressions if image_index is None else image_index, :, :, expressions][:, None]
    if scores.shape[2:] != visual_mask.shape[1:]:
        # Antialiasing changes nothing along an axis that grows.
        scores = nn.functional.interpolate(
            scores, size=visual_mask.shape[1:], mode="bilinear", align_corners=False, antialias=True
        )
    mask = visual_mask.flatten(1)
    return only_on_picture(scores.flatten(1) / temperature, mask).softmax(-1) * mask


def relation_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
    student_temperature: float | torch.Tensor,
    teacher_temperature: float | torch.Tensor,
) -> torch.Tensor:
    """
    Measures how differently student and teacher relate images and expressions. The cosines of each give a distribution
    of each image over the batch's expressions, and of each expression over the batch's images. The loss is the KL
    divergence of the student's distributions from the teacher's, averaged over images, averaged over expressions, and
    then over these two.

    To use this loss is our reading of EpmVG. It is the contrastive relational distillation (CRD) of CLIP-KD
    (winycg/CLIP-KD: src/open_clip/loss.py). It differs from the affinity mimicking of TinyCLIP (wkcn/TinyCLIP:
    src/open_clip/clip_soft_loss.py), which is a cross-entropy, only by the teacher's entropy, a constant. As in both,
    the loss is not multiplied by the squared temperature.

    Each image enters once, so an image with many expressions gets no more weight than others among the images of an
    expression. And because the targets are soft, the expressions of one image are not negatives of each other.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, e)`): the student's images, L2-normalised.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`): the student's expressions, L2-normalised.
        teacher_image_embeds (`torch.FloatTensor` of shape `(B, e')`):
            The teacher's images, L2-normalised; e' may differ from e.
        teacher_text_embeds (`torch.FloatTensor` of shape `(N, e')`): the teacher's expressions, L2-normalised.
        student_temperature (`float`): divisor of the student's cosines; may be a tensor that is learned.
        teacher_temperature (`float`): divisor of the teacher's cosines.

    Returns:
        `torch.FloatTensor`, a scalar in nats.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.distillation.losses import relation_loss

    >>> teacher = torch.eye(2)  # the embeddings of two images, and of an expression for each
    >>> relation_loss(teacher, teacher, teacher, teacher, 1.0, 1.0)
    tensor(0.)
    >>> relation_loss(teacher, teacher.flip(0), teacher, teacher, 1.0, 1.0)  # the student mixes them up
    tensor(0.4621)
    ```
    """
    student = _float32_product(image_embeds, text_embeds.T) / student_temperature
    teacher = (_float32_product(teacher_image_embeds, teacher_text_embeds.T) / teacher_temperature).detach()
    over_texts, over_images = (
        nn.functional.kl_div(student.log_softmax(dim), teacher.log_softmax(dim), reduction="none", log_target=True)
        .sum(dim)
        .mean()
        for dim in (1, 0)
    )
    return (over_texts + over_images) / 2


def feature_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
) -> torch.Tensor:
    """
    One minus the cosine of the student's and the teacher's embedding: the mean over images plus the mean over
    expressions. This is the feature distillation (FD) of CLIP-KD (winycg/CLIP-KD: src/open_clip/loss.py) without its
    dependence on the width: CLIP-KD's mean squared error of normalised embeddings is 2 / e times this loss, and so
    counts less for a wider teacher.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, e)`): the student's images, not necessarily normalised.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`): the student's expressions, not necessarily normalised.
        teacher_image_embeds (`torch.FloatTensor` of shape `(B, e)`): the teacher's images.
        teacher_text_embeds (`torch.FloatTensor` of shape `(N, e)`): the teacher's expressions.

    Returns:
        `torch.FloatTensor`, a scalar in [0, 4].

    Raises:
        ValueError: the student's and the teacher's embeddings differ in width.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.distillation.losses import feature_loss

    >>> teacher = torch.eye(2)
    >>> feature_loss(3 * teacher, teacher, teacher, teacher), feature_loss(-teacher, teacher, teacher, teacher)
    (tensor(0.), tensor(2.))
    ```
    """
    loss = torch.zeros((), device=image_embeds.device)
    for student, teacher in ((image_embeds, teacher_image_embeds), (text_embeds, teacher_text_embeds)):
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"the feature loss compares embeddings of equal width, but the student's have {student.shape[-1]} "
                f"dimensions and the teacher's {teacher.shape[-1]}"
            )
        loss = loss + (1 - nn.functional.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)).mean()
    return loss


def _float32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """
    Matrix product in float32, also under autocast. In bfloat16 a cosine may be off by 0.001, and a temperature of 0.01
    makes that 0.1.
    """
    with torch.autocast(left.device.type, enabled=False):
        return left.float() @ right.float()
