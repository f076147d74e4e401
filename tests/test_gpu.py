"""Training on a CUDA GPU: what PyTorch's fake tensors show of it anywhere, and what only a GPU shows."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from lablib import MLP, KnowledgeDistillationTrainer, ResidualCNN, StreamlinedTrainer, TrainingConfig
from lablib.data import ImageBatches

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BATCH = 128
STEPS = 11  # an epoch: nine tenths of digits' 1,437 training images
cnn = partial(ResidualCNN, 2, 16, (1, 28, 28))
CASES = {
    "mlp": (MLP, StreamlinedTrainer, {}),
    "cnn": (cnn, StreamlinedTrainer, {"precision": "bf16", "horizontal_flip": True, "lr_schedule": "cosine"}),
    "crops": (cnn, StreamlinedTrainer, {"precision": "bf16", "rotation_degrees": 0, "crop_padding": 2}),
    "distillation": (cnn, partial(KnowledgeDistillationTrainer, teacher=cnn()), {"precision": "bf16"}),
    "deterministic": (cnn, StreamlinedTrainer, {"deterministic": True}),  # after others, which have used cuBLAS
}
every_case = pytest.mark.parametrize(("network", "trainer_class", "more"), CASES.values(), ids=CASES)


class Transfers(TorchDispatchMode):
    """Counts what uses two devices: copies, and indices that lie on another one."""

    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        self.number += len({t.device for t in tensors if t.ndim or "copy" in operator.__name__}) > 1
        return result


@every_case
@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_a_forward_epoch_sends_a_gpu_its_order_and_asks_nothing(network, trainer_class, more, digits, monkeypatch):
    trainer = trainer_class(network(), config=TrainingConfig(device="cpu", **more), data=digits)
    monkeypatch.setattr(type(trainer.args), "device", gpu := torch.device("cuda"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # refuses to mix devices, and to tell a value

        def moved(tensor):
            return mode.from_tensor(tensor).to(gpu)

        for model in filter(None, (trainer.model, getattr(trainer, "teacher", None))):
            model._apply(moved)
        trainer._scale, trainer._offset = moved(trainer._scale), moved(trainer._offset)
        images = ImageBatches(moved(digits.train_images), moved(digits.train_labels), trainer.train_dataset.indices)
        with Transfers() as transfers:
            for positions in trainer.epoch_order(0).to(images.indices.device).split(BATCH):
                batch = images.__getitems__(positions)
                assert trainer.compute_loss(trainer.model.train(), batch).device.type == "cuda"
        assert transfers.number == 1
        trainer.run_model(trainer.model.eval(), batch["images"])


class NoWaiting(TrainerCallback):
    """An error for whatever waits for the GPU after an epoch's second step and before its last one."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % STEPS == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % STEPS == STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@every_case
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_within_an_epoch_waits_for_the_gpu(network, trainer_class, more, digits):
    config = TrainingConfig(num_epochs=2, batch_size=BATCH, device="cuda", **more)
    try:
        trainer = trainer_class(network(), config=config, data=digits, callbacks=[NoWaiting()])
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 2 * STEPS


@needs_gpu
def test_fp16_scales_the_loss_and_learns_what_fp32_learns(digits):
    accuracies = []
    for precision in ("fp32", "fp16"):
        config = TrainingConfig(num_epochs=8, batch_size=BATCH, device="cuda", precision=precision, learning_rate=1e-2)
        trainer = StreamlinedTrainer(cnn(), config, digits)
        trainer.train()
        accuracies.append(trainer.history[-1]["val_accuracy"])
    assert accuracies[0] > 0.9
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.05)
