"""ImageData, and the split into training and validation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedShuffleSplit

from lablib import ImageData, stratified_split
from lablib.data import stratified_subset

UNEQUAL = torch.arange(4).repeat_interleave(torch.tensor([83, 41, 29, 11]))


@pytest.fixture(autouse=True)
def _no_random_numbers_but_from_the_seed():
    before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("validation_split", [0.1, 0.25])
def test_a_split_is_scikit_learns(validation_split):
    parts = stratified_split(UNEQUAL, validation_split, seed=3)
    oracle = StratifiedShuffleSplit(n_splits=1, test_size=round(validation_split * len(UNEQUAL)), random_state=3)
    expected = next(oracle.split(np.zeros(len(UNEQUAL)), UNEQUAL.numpy()))
    assert [part.tolist() for part in parts] == [sorted(part) for part in expected]


def test_a_class_too_small_for_the_share_has_one_image_in_validation():
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 4)
    train, validation = stratified_split(labels, 0.1, seed=0)
    assert sorted([*train.tolist(), *validation.tolist()]) == [*range(84)]
    assert torch.bincount(labels[validation])[2] == 1
    assert len({stratified_split(labels, 0.1, seed)[1][-1].item() for seed in range(8)}) > 1


@pytest.mark.parametrize("labels", [[0] * 20 + [1], [0, 1, 2, 3] * 5])  # a class of one image; 2 images for 4 classes
def test_too_few_images_for_a_split_are_refused(labels):
    with pytest.raises(ValueError, match="class"):
        stratified_split(torch.tensor(labels), 0.1, seed=0)


@pytest.mark.parametrize("size", [40, 100, 121])
def test_a_subset_has_the_size_that_is_asked_for_and_each_class_its_share_to_within_one_image(size):
    train, _ = stratified_split(UNEQUAL, 0.25, seed=0)
    subset = stratified_subset(train, UNEQUAL, size, seed=0)
    assert torch.equal(subset, stratified_subset(train, UNEQUAL, size, seed=0))
    assert not torch.equal(subset, stratified_subset(train, UNEQUAL, size, seed=1))
    assert len({*subset.tolist()} & {*train.tolist()}) == len(subset) == size
    exact = torch.bincount(UNEQUAL[train]) * size / len(train)
    assert ((torch.bincount(UNEQUAL[subset], minlength=4) - exact).abs() <= 1).all()


def test_a_subset_may_be_all_and_no_class_may_have_no_image_in_it():
    train, _ = stratified_split(UNEQUAL, 0.25, seed=0)
    for size in (None, 10**6):
        assert torch.equal(stratified_subset(train, UNEQUAL, size, seed=0), train)
    with pytest.raises(ValueError, match="max_train_images = 5 leaves a class without an image"):
        stratified_subset(train, UNEQUAL, 5, seed=0)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("images", lambda x: x.float()),
        ("images", lambda x: x.movedim(1, 3)),
        ("images", lambda x: x.squeeze(1).numpy()),
        ("labels", lambda x: x.int()),
        ("labels", lambda x: x[:-1]),
        ("labels", lambda x: x.clamp(max=1)),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_field(tiny_data, part, field, change):
    with pytest.raises(ValueError, match=f"{part} {field} must be"):
        replace(tiny_data, **{f"{part}_{field}": change(getattr(tiny_data, f"{part}_{field}"))})


def test_channel_statistics_are_those_of_numpy_in_float64():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 6, 8), generator=generator, dtype=torch.uint8)
    images[:, 1] //= 4
    images[:, 2] = 51  # constant: a standard deviation that can be divided by
    labels = torch.arange(50) % 2
    data = ImageData("noise", images, labels, 255 - images, labels, ("a", "b"))
    mean, std = data.channel_statistics
    pixels = images.numpy().transpose(0, 2, 3, 1) / 255  # of the training images only; channels last
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, [*pixels.std((0, 1, 2))[:2], 1], rtol=1e-6)
    normal = data.normalise(images)
    np.testing.assert_allclose(normal.movedim(1, -1), (pixels - mean.numpy()) / std.numpy(), atol=1e-5)
    for wrong in (images / 255, images[0], images[:, :1]):
        with pytest.raises(ValueError, match="images must be"):
            data.normalise(wrong)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_fingerprint_is_that_of_pixels_labels_and_names_in_any_memory_layout(tiny_data, part):
    images, labels = getattr(tiny_data, f"{part}_images"), getattr(tiny_data, f"{part}_labels")
    other_layout = images.transpose(2, 3).contiguous().transpose(2, 3)
    same = replace(tiny_data, **{f"{part}_images": other_layout, f"{part}_labels": labels.clone()})
    assert same.fingerprint == tiny_data.fingerprint
    changes = {f"{part}_images": images + 1}, {f"{part}_labels": labels.flip(0)}, {"class_names": ("a", "b", "c")}
    assert len({replace(tiny_data, **change).fingerprint for change in changes} - {tiny_data.fingerprint}) == 3
    other_layout[0] += 1  # in place, as noise is added
    assert same.fingerprint == replace(same).fingerprint != tiny_data.fingerprint
