"""The distillation loss against NumPy, and its trainer against a plain loop."""

import re

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from lablib import MLP, StreamlinedTrainer, TrainingConfig
from lablib.data import stratified_split
from lablib.distillation import KnowledgeDistillationTrainer, distillation_loss
from lablib.models import ResidualCNN
from lablib.trainer import SanityCheckError


def config(**knobs) -> TrainingConfig:
    return TrainingConfig(**({"num_epochs": 2, "batch_size": 8, "validation_split": 0.25, "device": "cpu"} | knobs))


def network(seed: int = 0, **arguments) -> MLP:
    torch.manual_seed(seed)
    return MLP(**({"hidden_sizes": (8,), "image_shape": (1, 6, 6), "num_classes": 3} | arguments))


@pytest.mark.parametrize(("temperature", "alpha"), [(0.5, 0.3), (1.0, 1.0), (4.0, 0.7), (20.0, 0.0)])
def test_the_loss_is_that_of_numpy_in_float64(temperature, alpha):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 32, 10, generator=generator, dtype=torch.float64) * 3
    batch = *logits, torch.randint(0, 10, (32,), generator=generator)
    student, teacher, labels = (tensor.numpy() for tensor in batch)
    p, q = (log_softmax(logits / temperature, axis=1) for logits in (teacher, student))
    soft = temperature**2 * (np.exp(p) * (p - q)).sum() / len(labels)
    hard = -log_softmax(student, axis=1)[np.arange(len(labels)), labels].mean()
    losses = [loss.item() for loss in distillation_loss(*batch, temperature, alpha)]
    assert losses == pytest.approx([alpha * soft + (1 - alpha) * hard, soft, hard], rel=1e-12)


def test_the_training_is_that_of_a_plain_loop(tiny_data):
    knobs = config(rotation_degrees=0, translation_fraction=0, batch_size=100)  # one batch an epoch
    student, teacher, plain = (network(seed, dropout=0.0) for seed in (1, 2, 1))
    for model in (student, teacher):  # which may return dicts, as transformers' models do
        model.register_forward_hook(lambda module, images, logits: {"logits": logits})
    trainer = KnowledgeDistillationTrainer(student, teacher, knobs, tiny_data, 4.0, 0.7)
    trainer.train()
    train, _ = stratified_split(tiny_data.train_labels, 0.25, 0)
    images, labels = tiny_data.normalise(tiny_data.train_images[train]), tiny_data.train_labels[train]
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        terms = distillation_loss(plain(images), teacher(images)["logits"].detach(), labels, 4.0, 0.7)
        losses.append([term.item() for term in terms])
        optimizer.zero_grad()
        terms[0].backward()
        optimizer.step()
    rows = trainer.history
    recorded = [[row["train_loss"], row["train_soft_loss"], row["train_hard_loss"]] for row in rows]
    assert np.array(recorded) == pytest.approx(np.array(losses), rel=1e-5)
    assert all(r["val_loss"] == pytest.approx(0.7 * r["val_soft_loss"] + 0.3 * r["val_hard_loss"]) for r in rows)
    assert {id(p) for p in trainer.optimizer.param_groups[0]["params"]} == {id(p) for p in student.parameters()}


def test_the_teacher_stays_what_it_was_down_to_its_batch_norm_statistics(tiny_data):
    torch.manual_seed(0)
    teacher, student = ResidualCNN(1, 4, (1, 6, 6), 3).train(), ResidualCNN(1, 2, (1, 6, 6), 3)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = KnowledgeDistillationTrainer(student, teacher, config(), tiny_data)
    trainer.train()
    trainer.evaluate()
    for network_ in (teacher, trainer.teacher):
        assert all(torch.equal(tensor, before[name]) for name, tensor in network_.state_dict().items())
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert not trainer.teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trainer.teacher.parameters())


@pytest.mark.parametrize(("precision", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_teacher_and_student_see_the_same_augmented_images_in_the_same_precision(precision, expected, tiny_data):
    student, teacher = network(1), network(2)
    StreamlinedTrainer(teacher, config(precision="bf16"), tiny_data).train()
    trainer = KnowledgeDistillationTrainer(student, teacher, config(precision=precision), tiny_data)
    seen = [], []
    for watched, noted in zip((student, trainer.teacher), seen, strict=True):
        watched.hidden.register_forward_hook(
            lambda hidden, inputs, output, noted=noted: noted.append((inputs[0].clone(), output.dtype))
        )
    trainer.train()
    students, teachers = ({tuple(images.flatten().tolist()) for images, _ in noted} for noted in seen)
    assert students == teachers
    assert {dtype for noted in seen for _, dtype in noted} == {expected}
    assert len(seen[0]) - len(seen[1]) == 1  # the second epoch's validation


def test_the_teachers_remembered_answers_are_those_of_the_images_that_are_evaluated(tiny_data):
    student, teacher = network(1, dropout=0.0), network(2, dropout=0.0)
    trainer = KnowledgeDistillationTrainer(student, teacher, config(), tiny_data)
    _, validation = stratified_split(tiny_data.train_labels, 0.25, 0)
    images = tiny_data.train_images[validation], tiny_data.test_images, tiny_data.train_images[validation]
    labels = tiny_data.train_labels[validation], tiny_data.test_labels, tiny_data.train_labels[validation]
    measured = [trainer.evaluate()["eval_soft_loss"], trainer.test()["test_soft_loss"]]
    trainer.teacher.forward = None  # it cannot be asked again
    measured += [trainer.evaluate()["eval_soft_loss"]]
    for loss, shown, true in zip(measured, images, labels, strict=True):
        logits = [model(tiny_data.normalise(shown)) for model in (student, teacher)]
        assert loss == pytest.approx(distillation_loss(*logits, true, 4.0, 0.7)[1].item(), rel=1e-5)


def test_what_does_not_fit_is_refused(tiny_data):
    student, four = network(1), network(2, num_classes=4)
    pair = type("Pair", (MLP,), {"forward": lambda self, images: (images, images)})()
    wrong = [
        ({"alpha": -0.1}, "alpha = -0.1, but it must be a number from 0 (labels only) to 1 (teacher only)"),
        ({"temperature": float("inf")}, "temperature = inf, but it must be above 0 and at most 1000"),
        ({"teacher": pair}, "for 2 images, the teacher returns tuple, not logits (2, 3)"),
        ({"teacher": four}, "the teacher returns (2, 4), not logits (2, 3)"),
        ({"teacher": torch.nn.Sequential(network(2), torch.nn.Softmax(1))}, "the teacher returns probabilities"),
    ]
    for arguments, words in wrong:
        right = {"teacher": network(2), "config": config(), "data": tiny_data}
        with pytest.raises(ValueError, match=re.escape(words)):
            KnowledgeDistillationTrainer(student, **right | arguments)
    with pytest.raises(SanityCheckError, match="the network has 4 outputs, but tiny has 3 classes"):
        KnowledgeDistillationTrainer(four, network(2), config(), tiny_data).train()
