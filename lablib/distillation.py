"""Knowledge distillation: a small network learns from the logits of a large one."""

import copy
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.metrics import are_probabilities
from lablib.trainer import StreamlinedTrainer


def distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Total, soft and hard loss of a batch (Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531).

    total = alpha · soft + (1 − alpha) · hard; some libraries swap the two. soft = temperature² · KL(teacher ‖ student),
    both softened by the temperature; hard = cross-entropy with the labels; means over the batch. The factor
    temperature² keeps the soft term's gradient about the same size at all temperatures. Logits are batch × classes,
    labels batch.
    """
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    soft = temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    hard = F.cross_entropy(student_logits, labels)
    return alpha * soft + (1 - alpha) * hard, soft, hard


class KnowledgeDistillationTrainer(StreamlinedTrainer):
    """Trains a student on the labels and a teacher's logits for the same images; only the loss differs.

    The teacher is copied and frozen. The history has both terms, as soft_loss and hard_loss. Raises ValueError for an
    alpha outside [0, 1], a temperature outside (0, 1000], or a teacher that does not return one logit per class.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: TrainingConfig,
        data: ImageData,
        temperature: float = 4.0,
        alpha: float = 0.7,
        **trainer_arguments,
    ):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha = {alpha!r}, but it must be a number from 0 (labels only) to 1 (teacher only)")
        if not 0 < temperature <= 1000:  # above, float32 would round the soft loss away
            raise ValueError(f"temperature = {temperature!r}, but it must be above 0 and at most 1000, such as 4")
        self.temperature, self.alpha = float(temperature), float(alpha)
        super().__init__(student, config, data, **trainer_arguments)
        self.teacher = copy.deepcopy(teacher).requires_grad_(False).to(self.args.device)
        self.teacher.eval()
        with torch.no_grad():
            images = self.prepare_images(data.train_images[:2].to(self.args.device), False)
            logits = super().outputs(self.teacher, images)
        if getattr(logits, "shape", None) != (2, data.num_classes):
            given = tuple(getattr(logits, "shape", ())) or type(logits).__name__
            raise ValueError(f"for 2 images, the teacher returns {given}, not logits (2, {data.num_classes})")
        if are_probabilities(logits):
            raise ValueError("the teacher returns probabilities, not logits; remove its final softmax")
        self._answers = WeakKeyDictionary()  # evaluated data set -> the teacher's logits for each batch
        self._remembered, self._recorded = iter(()), []  # the current evaluation's known and new answers

    def outputs(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's and the teacher's logits (each batch × classes) for the same images, in the same precision."""
        teacher_logits = next(self._remembered, None)  # None in training and in a data set's first evaluation
        if teacher_logits is None:
            with torch.no_grad():
                teacher_logits = super().outputs(self.teacher, images.clone())  # a model may change its input in place
            if not model.training:
                self._recorded.append(teacher_logits)
        return super().outputs(model, images), teacher_logits

    def predict(self, test_dataset=None, ignore_keys=None, metric_key_prefix="test"):
        """As usual, but the teacher sees the validation images only once, since they are the same in every epoch."""
        answers = self._answers.setdefault(test_dataset, []) if test_dataset else []
        self._remembered, self._recorded = iter([*answers]), answers
        try:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._remembered, self._recorded = iter(()), []

    def losses(self, outputs: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The total loss and its two unweighted terms."""
        total, soft, hard = distillation_loss(*outputs, labels, self.temperature, self.alpha)
        return {"loss": total, "soft_loss": soft, "hard_loss": hard}
