"""The loss terms of a training step that need the teacher, over the batches of all processes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..model.losses import has_box, is_absent, map_loss
from ..model.modeling_epmvg import EpmVGGroundingOutput
from .clip_teacher import TeacherOutput
from .losses import feature_loss, relation_loss, teacher_map_target

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class DistillationWeights:
    """
    The weights of the terms of [`DistillationLoss`], and the temperatures of their distributions. All of them are our
    reading of EpmVG, of which only the abstract is public.

    Args:
        relation, feature, teacher_map (`float`): weight of each term; a term of weight 0 is not computed.
        teacher_map_rows (`str`): which expressions learn the teacher's map, `"all"` or those `"without_box"`.
        student_temperature, teacher_temperature (`float`): divisors of the image-text cosines in the relation term.
        map_temperature (`float`): divisor of the teacher's patch-text cosines.
    """

    relation: float = 0.0
    feature: float = 0.0
    teacher_map: float = 1.0
    teacher_map_rows: str = "all"
    student_temperature: float = 0.05
    teacher_temperature: float = 0.05
    map_temperature: float = 0.05

    @property
    def compares_embeddings(self) -> bool:
        """Whether any term needs the student's projections to the teacher's image-text space."""
        return self.relation + self.feature > 0

    @property
    def teaches(self) -> bool:
        """Whether any term has a weight, so that a teacher is needed."""
        return self.compares_embeddings or self.teacher_map > 0


@dataclass
class DistillationLoss:
    """
    Our reading of EpmVG: [`~losses.relation_loss`] and [`~losses.feature_loss`] teach the two backbones the teacher's
    image-text space, and [`~losses.map_loss`] teaches its patch-text map to the student's similarities before fusion.
    No term needs a box.

    The map is taught before fusion because the teacher compares each patch with the words by itself: it cannot tell
    the leftmost circle from the others. A student that is taught this map for its final consistency map learns to
    overlook such words. Taught before fusion, the map leaves them to what fusion adds, which learns from boxes.

    The relation loss compares all images with all expressions of all processes. Each process computes it from the
    embeddings of all, of which only its own carry a gradient. The sum of these gradients over the processes is the
    gradient that one process with the whole batch would have. DDP, FSDP and DeepSpeed average gradients instead of
    summing them, so these terms are multiplied by the number of processes.

    Args:
        weights ([`DistillationWeights`]): weights and temperatures.
        accelerator (`Accelerator`): connects the processes.
    """

    weights: DistillationWeights
    accelerator: "Accelerator"

    def __call__(
        self,
        outputs: EpmVGGroundingOutput,
        teacher: TeacherOutput,
        image_index: torch.Tensor,
        labels: torch.Tensor,
        num_boxes: torch.Tensor,
        num_absent: torch.Tensor,
        num_expressions: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """
        Args:
            outputs ([`EpmVGGroundingOutput`]): the student's outputs for this process's B images and N expressions.
            teacher ([`TeacherOutput`]): the teacher's outputs for the same images and expressions.
            image_index (`torch.LongTensor` of shape `(N,)`): the image of each expression.
            labels (`torch.FloatTensor` of shape `(N, 4)`): NaN for expressions without a box. Those that name nothing
                in their image, which have zeros, take no part in the map term: a map would show where they are.
            num_boxes, num_absent, num_expressions (`torch.LongTensor` of shape `()`):
                Boxes, expressions that name nothing in their image, and all expressions of the whole optimizer step,
                all accumulated batches and processes. Like all counts here, they stay on the device, because reading
                them would make a GPU wait.

        Returns:
            The weighted sum, to be added to the loss that is differentiated, and the unweighted terms of this batch,
            each with the number of this process's expressions that it covers: `loss_relation`, `loss_feature` (both
            over all processes) and `loss_teacher_map` (of this process).
        """
        weights = self.weights
        total = torch.zeros((), device=image_index.device)
        terms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if weights.compares_embeddings:
            relation, feature, batch_expressions = self._embedding_terms(outputs, teacher)
            # Each accumulated batch of a step counts by its number of expressions.
            share = batch_expressions / num_expressions
            for name, weight, term in (
                ("loss_relation", weights.relation, relation),
                ("loss_feature", weights.feature, feature),
            ):
                if term is not None:
                    terms[name] = (term, torch.full_like(num_expressions, len(image_index)))
                    total = total + weight * share * term
        if weights.teacher_map > 0:
            term, count = self._map_term(outputs, teacher, image_index, labels)
            terms["loss_teacher_map"] = (term, count)
            taught = num_expressions - num_absent
            if weights.teacher_map_rows == "without_box":
                taught = taught - num_boxes
            # The term is a mean over this process's rows. This factor makes it a part of the mean over all rows.
            share = count * self.accelerator.num_processes / taught.clamp(min=1)
            total = total + weights.teacher_map * share * term
        return total, terms

    def _embedding_terms(
        self, outputs: EpmVGGroundingOutput, teacher: TeacherOutput
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
        """The relation and feature terms, `None` where the weight is 0, and the number of gathered expressions."""
        assert outputs.image_embeds is not None and outputs.text_embeds is not None  # see check_teacher
        images, teacher_images = self._gather(outputs.image_embeds, teacher.image_embeds)
        texts, teacher_texts = self._gather(outputs.text_embeds, teacher.text_embeds)
        embeds = (images, texts, teacher_images, teacher_texts)
        weights, relation, feature = self.weights, None, None
        if weights.relation > 0:
            temperatures = (weights.student_temperature, weights.teacher_temperature)
            relation = self._summed_over_processes(relation_loss(*embeds, *temperatures))
        if weights.feature > 0:
            feature = self._summed_over_processes(feature_loss(*embeds))
        return relation, feature, len(texts)

    def _map_term(
        self, outputs: EpmVGGroundingOutput, teacher: TeacherOutput, image_index: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The map term, a mean over those rows of this process that learn the map, and the number of these rows."""
        assert outputs.visual_mask is not None and outputs.similarity_map is not None
        assert teacher.patch_embeds is not None  # `Teaching` requests them for this term
        mask = outputs.visual_mask[image_index].bool()
        temperature = self.weights.map_temperature
        target = teacher_map_target(teacher.patch_embeds, teacher.text_embeds, image_index, mask, temperature)
        rows = ~is_absent(labels)
        if self.weights.teacher_map_rows == "without_box":
            rows = rows & ~has_box(labels)
        return map_loss(outputs.similarity_map, target, mask.flatten(1), rows), rows.sum()

    def _summed_over_processes(self, term: torch.Tensor) -> torch.Tensor:
        """The same value, with a gradient whose average over the processes is the sum of what each contributes."""
        return term + (self.accelerator.num_processes - 1) * (term - term.detach())

    def _gather(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers the rows of all processes in their order. The processes may have different numbers of rows."""
        student, teacher = student.float(), teacher.float()
        if self.accelerator.num_processes == 1:
            return student, teacher
        own = torch.cat([student.detach(), teacher], dim=-1)
        counts = self.accelerator.gather(torch.tensor([len(own)], device=own.device)).tolist()
        padded = self.accelerator.pad_across_processes(own)
        gathered = self.accelerator.gather(padded).unflatten(0, (len(counts), -1))
        rows = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        parts = [part.split([student.shape[1], teacher.shape[1]], dim=-1) for part in rows]
        students = [part for part, _ in parts]
        students[self.accelerator.process_index] = student
        return torch.cat(students), torch.cat([part for _, part in parts])
