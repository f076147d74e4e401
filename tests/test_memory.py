"""Whether a batch fits into memory: tried before the training, and without a trace."""

import copy
import pickle
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from lablib import MLP, ImageData, KnowledgeDistillationTrainer, ResidualCNN, StreamlinedTrainer, TrainingConfig, memory
from lablib.memory import BatchTooLargeError, LiveBytes, check_batch_fits, free_memory
from lablib.metrics import history

CPU = torch.device("cpu")


def config(**knobs) -> TrainingConfig:
    defaults = {"num_epochs": 2, "batch_size": 16, "validation_split": 0.25, "device": "cpu"}
    return TrainingConfig(**{**defaults, **knobs})


def small_mlp(dropout: float = 0.3) -> MLP:
    return MLP((8,), dropout, image_shape=(1, 6, 6), num_classes=3)


def small_cnn() -> ResidualCNN:
    return ResidualCNN(1, 4, image_shape=(1, 6, 6), num_classes=3)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def many_images() -> ImageData:
    """400 + 6 images of 6 × 6 pixels in 3 classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (406, 1, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.arange(406) % 3
    return ImageData("many", images[:400], labels[:400], images[400:], labels[400:], ("a", "b", "c"))


class Limited(MLP):
    """Takes up to so many images in a forward pass, and notes how many it was shown."""

    most, error, sizes = 0, torch.OutOfMemoryError("CUDA out of memory."), ()

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        self.sizes = (*self.sizes, len(images))
        if len(images) > self.most:
            raise self.error
        return super().forward(images)


def limited(most: int, error: Exception) -> Limited:
    model = Limited((8,), image_shape=(1, 6, 6), num_classes=3)
    model.most, model.error = most, error
    return model


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1.0 GB)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_that_is_refused_is_halved_until_one_fits_with_a_quarter_to_spare_which_the_error_names(
    error, many_images
):
    trainer = StreamlinedTrainer(limited(70, error), config(batch_size=256), many_images)
    with pytest.raises(BatchTooLargeError) as caught:
        trainer.train()
    words = r"a batch of 256 images does not fit into the memory of the cpu \(\d+\.\d GiB free\); "
    caught.match(words + "32 was tried and fits: write batch_size=32$")
    # 8 and less are for the estimate; 64 images would fit as well, but not a quarter more of them
    assert [size for size in trainer.model.sizes if size > 8] == [256, 160, 80, 40]
    assert trainer.state.global_step == 0
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_a_batch_is_no_larger_than_the_training_set(many_images):
    trainer = StreamlinedTrainer(limited(280, ERRORS[0]), config(batch_size=1000), many_images)
    with pytest.raises(BatchTooLargeError, match=r"a batch of 300 images does not fit .* write batch_size=150"):
        check_batch_fits(trainer)


def test_where_not_one_image_fits_a_smaller_model_or_smaller_images_are_advised(tiny_data):
    trainer = StreamlinedTrainer(limited(0, ERRORS[0]), config(), tiny_data)
    with pytest.raises(
        BatchTooLargeError, match="not even a batch of one image fits into the memory of the cpu"
    ) as caught:
        trainer.train()
    advice = ": take a smaller model, or scale the images down, as load_data(..., image_size=32) does"
    assert str(caught.value).endswith(advice)
    assert trainer.model.sizes[-1] == 1


def test_another_error_of_a_model_stays_what_it_is(tiny_data):
    trainer = StreamlinedTrainer(
        limited(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), config(), tiny_data
    )
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trainer.train()


def test_a_batch_is_left_to_the_trainer_that_finds_its_size_itself(tiny_data):
    knobs = config(training_arguments={"auto_find_batch_size": True})
    check_batch_fits(StreamlinedTrainer(limited(0, ERRORS[0]), knobs, tiny_data))


def test_a_model_that_cannot_be_copied_is_trained_unchecked(tiny_data):
    model = small_mlp()
    model.activations = model(torch.zeros(2, 1, 6, 6))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    trainer = StreamlinedTrainer(model, config(num_epochs=1), tiny_data)
    trainer.train()
    assert trainer.state.global_step == 2


# No trace


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [small_mlp, small_cnn])
def test_a_training_is_bitwise_the_same_with_and_without_the_check(build, precision, tiny_data, monkeypatch):
    trained = []
    for check in (check_batch_fits, lambda trainer: None):
        monkeypatch.setattr("lablib.trainer.check_batch_fits", check)
        torch.manual_seed(0)
        trainer = StreamlinedTrainer(build(), config(precision=precision, horizontal_flip=True), tiny_data)
        trainer.train()
        trained.append(trainer)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in history(trainer.state.log_history)]
        for trainer in trained
    ]
    assert rows[0] == rows[1]
    assert same_bits(trained[0].model.state_dict(), trained[1].model.state_dict())


@pytest.mark.parametrize("free", [2**40, 0])
@pytest.mark.parametrize("trained_before", [False, True])
def test_a_check_changes_neither_random_states_nor_the_model_nor_what_is_measured(
    free, trained_before, tiny_data, monkeypatch
):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr("lablib.trainer.check_batch_fits", lambda trainer: None)
    trainer = StreamlinedTrainer(small_cnn(), config(precision="bf16"), tiny_data)
    if trained_before:
        trainer.train()  # accelerate has changed the model's forward since
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights, modes = copy.deepcopy(trainer.model.state_dict()), [m.training for m in trainer.model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    if free:
        check_batch_fits(trainer)
    else:
        with pytest.raises(BatchTooLargeError):
            check_batch_fits(trainer)
    assert same_bits(trainer.model.state_dict(), weights)
    assert all((parameter.grad == 1).all() for parameter in trainer.model.parameters())
    assert [m.training for m in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert len(trainer._since_last_log) == 0


def test_the_training_part_of_a_distillation_is_tried_with_its_teacher(many_images):
    teacher = limited(50, ERRORS[0])
    trainer = KnowledgeDistillationTrainer(small_mlp(), teacher, config(batch_size=256), many_images)
    with pytest.raises(BatchTooLargeError, match=r"a batch of 256 images .* write batch_size=32"):
        trainer.train()
    teacher.most = 1000
    trainer.train()
    assert trainer.state.global_step == 4


class OfAllProcesses(torch.nn.Module):
    def forward(self, images):
        raise AssertionError("every process would have to take part")


def test_a_distributed_training_tries_each_processs_own_model(tiny_data):
    trainer = StreamlinedTrainer(small_mlp(), config(), tiny_data)
    trainer.model_wrapped = OfAllProcesses()  # where DistributedDataParallel is
    check_batch_fits(trainer)


# The estimate


class Square(MLP):
    """Takes memory by the square of the batch, as contrastive losses do: 300 images take 360 kB a matrix."""

    def forward(self, images):
        logits = super().forward(images)
        return logits + 1e-6 * sum((logits @ logits.T * i).exp() for i in range(8)).sum(1, keepdim=True)


def test_a_batch_whose_estimate_exceeds_what_is_free_is_not_tried(many_images, monkeypatch):
    trainer = StreamlinedTrainer(limited(10**6, ERRORS[0]), config(batch_size=256), many_images)
    needed = {size: memory._estimated_bytes(trainer, trainer.model, size) for size in (64, 128)}
    trainer.model.sizes = ()
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.3 * needed[64])
    with pytest.raises(BatchTooLargeError, match=r"a batch of 256 images .* \(0.0 GiB free\); 64 was tried and fits"):
        check_batch_fits(trainer)
    assert [size for size in trainer.model.sizes if size > 8] == [80]  # 64, and a quarter to spare


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [small_mlp, small_cnn])
def test_the_estimate_from_small_batches_is_what_a_large_one_takes(build, precision, many_images, monkeypatch):
    trainer = StreamlinedTrainer(build(), config(precision=precision), many_images)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)  # or an upper bound would do
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
    model = copy.deepcopy(trainer.model)
    for size in (64, 256):
        measured = max(memory._pass(trainer, model, size, measured=True))
        assert memory._estimated_bytes(trainer, model, size) == pytest.approx(measured + 2 * weights, rel=0.02)


@pytest.mark.parametrize(("free", "returned"), [(2**40, False), (10**7, True)])
def test_what_a_trial_took_decides_whether_freed_memory_is_kept(free, returned, many_images, monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(memory, "return_freed_memory", lambda: calls.append("returned"))
    monkeypatch.setattr(memory, "keep_freed_memory", lambda kept=True: calls.append("kept" if kept else "not kept"))
    trainer = StreamlinedTrainer(
        Square((8,), image_shape=(1, 6, 6), num_classes=3), config(batch_size=400), many_images
    )
    assert 10 * memory._estimated_bytes(trainer, trainer.model, 300) < 10**7  # by which there is plenty
    check_batch_fits(trainer)
    assert calls[0] == "not kept"  # in the trial itself
    assert calls[-1] == ("returned" if returned else "kept")


def test_live_bytes_are_those_of_a_chain_by_hand():
    x = torch.zeros(10, 10, requires_grad=True)  # 400 bytes
    with LiveBytes([x]) as live:
        y = x.exp()  # which autograd keeps
        z = (y + 1).relu().sum()  # autograd keeps relu's result; y + 1 and the view that sum makes are gone
        del y
        z.backward()
        del z
        x.neg()
    assert live.peak == 1208  # exp, y + 1 and relu, or later a gradient; the sum and its gradient
    assert live.timeline[-1] == 800  # the gradient, and what x.neg() gives
    assert torch.equal(x.grad, torch.ones_like(x))


# What is free


def cgroup(root: Path, group: str, limit: str, used: int, cached: int):
    folder = root / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached - 100}\nactive_file 100\n")


def test_free_memory_is_that_of_the_machine_without_a_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    free, total = free_memory(CPU), memory.psutil.virtual_memory().total
    assert 0 < free < total
    block = torch.ones(50 * 2**20 // 4)  # 50 MiB
    assert free - free_memory(CPU) < total / 2
    del block


def test_free_memory_heeds_the_tightest_control_group_and_counts_cached_files_as_free(monkeypatch, tmp_path):
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    group = line.removeprefix("0::/")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    cgroup(tmp_path, group, "8000000", used=6_000_000, cached=1_000_000)
    assert free_memory(CPU) == 3_000_000
    cgroup(tmp_path, group, "max", used=6_000_000, cached=1_000_000)
    assert free_memory(CPU) > 3_000_000


def in_a_process(code: str, gib: float) -> str:
    """What a program prints whose address space may grow by so much once PyTorch is there."""
    limited = f"""
        import resource, psutil, torch, warnings
        from lablib import ImageData, MLP, StreamlinedTrainer, TrainingConfig
        from lablib.memory import BatchTooLargeError, free_memory
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        labels = torch.arange(12_000) % 2
        images = torch.randint(0, 256, (12_000, 1, 28, 28), dtype=torch.uint8)
        data = ImageData("noise", images, labels, images[:1000], labels[:1000], ("a", "b"))

        def train(model, batch_size):
            knobs = TrainingConfig(num_epochs=1, batch_size=batch_size, device="cpu", precision="fp32")
            StreamlinedTrainer(model, knobs, data).train()

        train(MLP((8,), num_classes=2), 1000)
        limit = psutil.Process().memory_info().vms + int({gib} * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    """
    program = textwrap.dedent(limited) + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


SUGGESTED = """
    def suggestion(model, batch_size):
        try:
            train(model, batch_size)
        except BatchTooLargeError as error:
            print(error)
            return int(str(error).rpartition("batch_size=")[2])

    size = suggestion({model}, {batch_size})
    train({model}, size)
    print("trained with", size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are those of Linux")
def test_in_too_little_memory_a_large_batch_is_refused_and_the_one_advised_trains():
    printed = in_a_process(SUGGESTED.format(model="MLP((1024, 1024), num_classes=2)", batch_size=10_000), gib=0.15)
    message, trained = printed.splitlines()
    assert message.startswith("a batch of 10000 images does not fit into the memory of the cpu (0.")
    size = int(trained.removeprefix("trained with "))
    assert message.endswith(f"GiB free); {size} was tried and fits: write batch_size={size}")
    assert 500 < size < 10_000


SIMILARITIES = """
    class Similarities(MLP):
        def forward(self, images):  # takes memory by the square of the batch
            logits = super().forward(images)
            return logits + 1e-6 * (logits @ logits.T).exp().sum(1, keepdim=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are those of Linux")
def test_a_batch_that_no_estimate_refuses_fails_in_the_trial_and_the_one_advised_trains():
    code = SIMILARITIES + SUGGESTED.format(model="Similarities((8,), num_classes=2)", batch_size=10_000)
    # a pass of 10,000 images takes 0.8 GiB, one of the 6,250 that 5,000 are tried with a third of that
    message, trained = in_a_process(code, gib=0.65).splitlines()
    assert message.startswith("a batch of 10000 images does not fit into the memory of the cpu (")
    size = int(trained.removeprefix("trained with "))
    assert message.endswith(f"{size} was tried and fits: write batch_size={size}")
    assert 500 < size < 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are those of Linux")
def test_what_a_trial_took_is_free_again_for_the_training():
    code = """
    from lablib.memory import check_batch_fits

    model = Similarities((8,), num_classes=2)
    knobs = TrainingConfig(num_epochs=1, batch_size=5000, device="cpu", precision="fp32")
    trainer = StreamlinedTrainer(model, knobs, data)
    before = free_memory(trainer.args.device)
    check_batch_fits(trainer)
    print(before - free_memory(trainer.args.device))
    """
    missing = int(in_a_process(SIMILARITIES + code, gib=0.5))
    assert missing < 140e6  # of the 210 MB that the trial took; 270e6 if pieces of them are kept
