"""What only a CUDA GPU can show; skipped elsewhere."""

from functools import partial

import pytest
import torch
from transformers import TrainerCallback

from lablib import MLP, KnowledgeDistillationTrainer, ResidualCNN, StreamlinedTrainer, TrainingConfig
from lablib.metrics import history

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BATCH = 128
STEPS = 11  # an epoch: nine tenths of digits' 1,437 training images
cnn = partial(ResidualCNN, 2, 16, (1, 28, 28))


class NoWaiting(TrainerCallback):
    """An error for whatever waits for the GPU after an epoch's second step and before its last one."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % STEPS == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % STEPS == STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("network", "trainer_class", "more"),
    [
        (MLP, StreamlinedTrainer, {}),
        (cnn, StreamlinedTrainer, {"precision": "bf16", "horizontal_flip": True, "lr_schedule": "cosine"}),
        (cnn, StreamlinedTrainer, {"precision": "bf16", "rotation_degrees": 0, "crop_padding": 2}),
        (cnn, partial(KnowledgeDistillationTrainer, teacher=cnn()), {"precision": "bf16"}),
        (cnn, StreamlinedTrainer, {"deterministic": True}),  # after others, which have used cuBLAS
    ],
    ids=["mlp", "cnn", "crops", "distillation", "deterministic"],
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_within_an_epoch_waits_for_the_gpu(network, trainer_class, more, digits):
    config = TrainingConfig(num_epochs=2, batch_size=BATCH, device="cuda", **more)
    try:
        trainer = trainer_class(network(), config=config, data=digits, callbacks=[NoWaiting()])
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 2 * STEPS


def test_fp16_scales_the_loss_and_learns_what_fp32_learns(digits):
    accuracies = []
    for precision in ("fp32", "fp16"):
        config = TrainingConfig(num_epochs=8, batch_size=BATCH, device="cuda", precision=precision, learning_rate=1e-2)
        trainer = StreamlinedTrainer(cnn(), config, digits)
        assert (trainer.accelerator.scaler is None) == (precision == "fp32")
        trainer.train()
        accuracies.append(history(trainer.state.log_history)[-1]["val_accuracy"])
    assert accuracies[0] > 0.9
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.05)
