"""ImageData, its batches, and the split into training and validation."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedShuffleSplit
from torch.utils.data import DataLoader

from lablib import MLP, ImageData, SimpleCNN, StreamlinedTrainer, TrainingConfig, stratified_split
from lablib.data import ImageBatches, stratified_subset
from lablib.metrics import history

UNEQUAL = torch.arange(4).repeat_interleave(torch.tensor([83, 41, 29, 11]))


def random_states() -> list:
    return [*torch.get_rng_state().tolist(), *np.random.get_state()[1].tolist()]  # noqa: NPY002


@pytest.mark.parametrize("validation_split", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_is_disjoint_complete_and_shares_out_each_class_to_within_one_image(digits, validation_split, seed):
    for labels in (digits.train_labels, UNEQUAL):
        before = random_states()
        train, validation = stratified_split(labels, validation_split, seed)
        assert random_states() == before
        assert len(validation) == round(validation_split * len(labels))
        assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(len(labels)))
        counts = torch.bincount(labels)
        for part in (train, validation):
            exact = counts * len(part) / len(labels)
            assert ((torch.bincount(labels[part], minlength=len(counts)) - exact).abs() <= 1).all()


def test_a_split_is_scikit_learns():
    train, validation = stratified_split(UNEQUAL, 0.25, seed=3)
    oracle = StratifiedShuffleSplit(n_splits=1, test_size=41, random_state=3)
    expected_train, expected_validation = next(oracle.split(np.zeros(len(UNEQUAL)), UNEQUAL.numpy()))
    assert train.tolist() == sorted(expected_train)
    assert validation.tolist() == sorted(expected_validation)


@pytest.mark.parametrize(
    ("labels", "validation_split"),
    [
        (torch.tensor([0] * 20 + [1]), 0.2),  # a class of one image
        (torch.arange(4).repeat(5), 0.1),  # 2 images for 4 classes in validation
        (torch.arange(4).repeat(5), 0.95),  # 1 image for 4 classes in training
    ],
)
def test_too_few_images_for_a_split_are_refused(labels, validation_split):
    with pytest.raises(ValueError, match=r"each part needs an image of each class; add images or change it$") as caught:
        stratified_split(labels, validation_split, seed=0)
    assert f"{len(labels)} images" in str(caught.value)
    assert f"validation_split = {validation_split}" in str(caught.value)


@pytest.mark.parametrize("size", [40, 100, 117, 121])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_subset_has_the_size_that_is_asked_for_and_each_class_its_share_to_within_one_image(size, seed):
    train, _ = stratified_split(UNEQUAL, 0.25, seed=0)
    before = random_states()
    subset = stratified_subset(train, UNEQUAL, size, seed)
    assert random_states() == before
    assert torch.equal(subset, stratified_subset(train, UNEQUAL, size, seed))
    assert not torch.equal(subset, stratified_subset(train, UNEQUAL, size, seed + 1))
    assert len(subset) == len(subset.unique()) == size
    assert torch.isin(subset, train).all()
    assert torch.equal(subset, subset.sort().values)
    exact = torch.bincount(UNEQUAL[train]) * size / len(train)
    assert ((torch.bincount(UNEQUAL[subset], minlength=4) - exact).abs() <= 1).all()


@pytest.mark.parametrize("size", [None, 123, 124, 10**6])
def test_a_subset_of_no_size_or_of_at_least_all_is_all(size):
    train, _ = stratified_split(UNEQUAL, 0.25, seed=0)
    assert len(train) == 123
    assert torch.equal(stratified_subset(train, UNEQUAL, size, seed=0), train)


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_a_subset_in_which_a_class_would_have_no_image_is_refused(size):
    words = "classes leaves a class without an image; write a larger number, or None for all"
    with pytest.raises(ValueError, match=f"max_train_images = {size} of 164 training images in 4 {words}"):
        stratified_subset(torch.arange(164), UNEQUAL, size, seed=0)


def test_a_subset_may_hold_the_only_image_of_a_class():
    labels = torch.tensor([0] * 10 + [1])
    assert stratified_subset(torch.arange(11), labels, 6, seed=0)[-1] == 10


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("images", lambda x: x.float(), "images are torch.float32 of shape"),
        ("images", lambda x: x.numpy(), "images are uint8 of shape"),
        ("images", lambda x: x[:, 0], r"images are torch.uint8 of shape \(\d+, 6, 6\); they must be"),
        ("images", lambda x: x[..., :0], r"images are torch.uint8 of shape \(\d+, 1, 6, 0\)"),
        ("labels", lambda x: x.int(), "labels are torch.int32 .*; they must be torch.int64, one for each of the "),
        ("labels", lambda x: x[:-1], r"labels are torch.int64 of shape \(\d+,\)"),
        ("labels", lambda x: x + 1, "labels must be 0 to 2, each at least once; missing or out of range: .0, 3."),
        ("labels", lambda x: x - 1, "labels must be 0 to 2, .*: .-1, 2."),
        ("labels", lambda x: x.clamp(max=1), "labels must be 0 to 2, .*: .2."),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name_and_part(tiny_data, part, field, change, words):
    with pytest.raises(ValueError, match=f"tiny: the {part} {words}"):
        replace(tiny_data, **{f"{part}_{field}": change(getattr(tiny_data, f"{part}_{field}"))})


def test_tensors_that_are_converted_as_the_errors_say_are_the_original_ones(tiny_data):
    images, labels = tiny_data.train_images[:, 0] / 255, tiny_data.train_labels.int()
    with pytest.raises(ValueError, match="scale values to 0 to 255 and write ") as caught:
        replace(tiny_data, train_images=images)
    assert str(caught.value).endswith(
        "they must be torch.uint8, images × channels × height × width: scale values to 0 to 255 and write "
        "images.round().to(torch.uint8); images.unsqueeze(1) gives grey images their channel"
    )
    with pytest.raises(ValueError, match=r"one for each of the 36 images: torch.as_tensor\(labels\).long\(\)"):
        replace(tiny_data, train_labels=labels)
    converted = (255 * images).round().to(torch.uint8).unsqueeze(1), torch.as_tensor(labels).long()
    again = replace(tiny_data, train_images=converted[0], train_labels=converted[1])
    assert again.fingerprint == tiny_data.fingerprint


def test_one_image_a_class_cannot_be_split(tiny_data):
    three = replace(tiny_data, train_images=tiny_data.train_images[:3], train_labels=tiny_data.train_labels[:3])
    with pytest.raises(ValueError, match=r"3 images, 1 of the rarest of 3 classes, cannot be split .*; add images or"):
        StreamlinedTrainer(MLP((4,), image_shape=(1, 6, 6), num_classes=3), TrainingConfig(device="cpu"), three)


def trained(data: ImageData, model, **knobs) -> StreamlinedTrainer:
    defaults = {"num_epochs": 2, "batch_size": 8, "validation_split": 0.25, "device": "cpu"}
    trainer = StreamlinedTrainer(model, TrainingConfig(**{**defaults, **knobs}), data)
    trainer.train()
    return trainer


def mlp_and_cnn(channels: int) -> list[torch.nn.Module]:
    shape = (channels, 6, 6)
    return [MLP((4,), image_shape=shape, num_classes=3), SimpleCNN(1, 4, image_shape=shape, num_classes=3)]


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("network", [0, 1])
def test_images_that_are_all_the_same_train_to_finite_figures_at_chance(tiny_data, network, value):
    flat = {name: torch.full_like(getattr(tiny_data, name), value) for name in ("train_images", "test_images")}
    trainer = trained(
        replace(tiny_data, **flat), mlp_and_cnn(1)[network], rotation_degrees=0.0, translation_fraction=0.0
    )
    rows = history(trainer.state.log_history)
    assert len(rows) == 2
    assert np.isfinite([value for row in rows for value in row.values()]).all()
    assert trainer.test()["test_accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("network", [0, 1])
def test_a_constant_channel_beside_others_trains_to_finite_figures(tiny_data, network):
    def with_constant(images):
        return torch.cat([images, torch.full_like(images, 200)], dim=1)

    images = {name: with_constant(getattr(tiny_data, name)) for name in ("train_images", "test_images")}
    trainer = trained(replace(tiny_data, **images), mlp_and_cnn(2)[network], num_epochs=10, learning_rate=0.02)
    rows = history(trainer.state.log_history)
    assert np.isfinite([value for row in rows for value in row.values()]).all()
    assert trainer.test()["test_accuracy"] > 0.6  # by the other channel


def test_a_training_set_smaller_than_a_batch_trains_in_one_step_an_epoch(tiny_data):
    trainer = trained(tiny_data, mlp_and_cnn(1)[0], batch_size=4096)
    assert trainer.state.global_step == 2
    assert len(history(trainer.state.log_history)) == 2


def test_training_and_test_images_of_different_sizes_are_refused(tiny_data):
    with pytest.raises(ValueError, match=r"training images are \(1, 6, 6\) and the test images \(1, 6, 5\)") as caught:
        replace(tiny_data, test_images=tiny_data.test_images[..., :5])
    assert str(caught.value).endswith(
        "channels, height, width); they must have one shape, as load_data(..., image_size=32, channels=3) makes them"
    )


def test_a_data_set_of_one_class_is_refused(tiny_data):
    with pytest.raises(ValueError, match="tiny has 1 class; a classifier needs at least two"):
        replace(tiny_data, class_names=("only",))


def test_channel_statistics_are_those_of_numpy_in_float64():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 6, 8), generator=generator, dtype=torch.uint8)
    images[:, 1] //= 4
    images[:, 2] = 51  # constant: a standard deviation that can be divided by
    labels = torch.arange(50) % 2
    data = ImageData("noise", images, labels, 255 - images, labels, ("a", "b"))
    mean, std = data.channel_statistics
    pixels = images.numpy().astype(np.float64) / 255  # of the training images only
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, [*pixels.std((0, 2, 3))[:2], 1], rtol=1e-6)
    normal = data.normalise(images)
    assert normal.dtype == mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(normal.double().mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.double().std((0, 2, 3), correction=0), [1, 1, 0], atol=1e-5)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_fingerprint_changes_with_one_pixel_and_with_one_label(tiny_data, part):
    images, labels = getattr(tiny_data, f"{part}_images").clone(), getattr(tiny_data, f"{part}_labels").clone()
    same = replace(tiny_data, **{f"{part}_images": images.clone(), f"{part}_labels": labels.clone()})
    assert same.fingerprint == tiny_data.fingerprint
    images[-1, 0, -1, -1] += 1
    labels[0] = 1
    changed = {
        replace(tiny_data, **{f"{part}_images": images}).fingerprint,
        replace(tiny_data, **{f"{part}_labels": labels}).fingerprint,
        replace(tiny_data, class_names=("top", "middle", "base")).fingerprint,
        tiny_data.fingerprint,
    }
    assert len(changed) == 4


def test_the_fingerprint_does_not_depend_on_the_memory_layout(tiny_data):
    transposed = tiny_data.train_images.transpose(2, 3).contiguous().transpose(2, 3)
    assert not transposed.is_contiguous()
    assert replace(tiny_data, train_images=transposed).fingerprint == tiny_data.fingerprint


def test_a_pickled_data_set_comes_back_as_it_was(tiny_data):
    copy = pickle.loads(pickle.dumps(tiny_data))
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(copy, name), getattr(tiny_data, name))
        assert getattr(copy, name).dtype == getattr(tiny_data, name).dtype
    assert (copy.name, copy.class_names) == (tiny_data.name, tiny_data.class_names)
    assert copy.fingerprint == replace(copy).fingerprint == tiny_data.fingerprint
    assert torch.equal(copy.channel_statistics[0], tiny_data.channel_statistics[0])


def test_getitems_gives_the_images_and_labels_of_the_chosen_indices_in_order(digits):
    indices = torch.tensor([11, 3, 700, 3, 42])
    batch = ImageBatches(digits.train_images, digits.train_labels, indices).__getitems__([4, 0, 2])
    assert batch.keys() == {"images", "labels"}
    assert torch.equal(batch["images"], digits.train_images[[42, 11, 700]])
    assert torch.equal(batch["labels"], digits.train_labels[[42, 11, 700]])


def test_without_indices_a_data_set_is_all_images(tiny_data):
    dataset = ImageBatches(tiny_data.train_images, tiny_data.train_labels)
    assert len(dataset) == 36
    assert torch.equal(dataset[7]["images"], tiny_data.train_images[7])
    assert dataset[7]["labels"] == tiny_data.train_labels[7]


def test_a_data_loader_takes_whole_batches_and_visits_each_image_once(digits):
    indices = torch.arange(0, 200, 2)
    dataset = ImageBatches(digits.train_images, digits.train_labels, indices)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, 32, shuffle=True, collate_fn=lambda batch: batch, generator=generator)
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [32, 32, 32, 4]
    seen = torch.cat([batch["images"] for batch in batches]).flatten(1)
    expected = digits.train_images[indices].flatten(1)
    assert sorted(seen.tolist()) == sorted(expected.tolist())
