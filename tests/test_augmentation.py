"""Augmentation on a batch, against torchvision and kornia image by image."""

import kornia
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from lablib import augmentation
from lablib.augmentation import affine, augment, crop

SHAPES = [(1, 28, 28), (3, 28, 28), (1, 20, 32), (3, 33, 18)]


def random_batch(shape, batch=6):
    """Images, angles of up to 40°, shifts of up to 3 pixels, and flips."""
    generator = torch.Generator().manual_seed(sum(shape))
    images = torch.rand(batch, *shape, generator=generator)
    angles = torch.rand(batch, generator=generator) * 80 - 40
    shifts = torch.rand(batch, 2, generator=generator) * 6 - 3
    return images, angles, shifts, torch.arange(batch) % 2 == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_flips", [False, True])
def test_affine_is_torchvisions_image_by_image_and_kornias(shape, with_flips):
    images, angles, shifts, flips = random_batch(shape)
    result = affine(images, angles, shifts, flips if with_flips else None)
    originals = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images) if with_flips else images
    oracle = [
        # torchvision turns clockwise
        transforms.affine(image, -angle.item(), shift.tolist(), 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)
        for image, angle, shift in zip(originals, angles, shifts, strict=True)
    ]
    torch.testing.assert_close(result, torch.stack(oracle), atol=1e-4, rtol=0)
    height, width = shape[1:]
    centre = torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(len(images), 2)
    matrix = kornia.geometry.get_affine_matrix2d(shifts, centre, torch.ones(len(images), 2), -angles)[:, :2]
    oracle = kornia.geometry.warp_affine(originals, matrix, (height, width), align_corners=True)
    torch.testing.assert_close(result, oracle, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [1, 4])
def test_crop_is_torchvisions_padding_and_cropping_image_by_image(shape, padding):
    images = random_batch(shape)[0]
    corners = torch.randint(2 * padding + 1, (len(images), 2), generator=torch.Generator().manual_seed(0))
    oracle = [
        transforms.crop(transforms.pad(image, [padding]), top.item(), left.item(), *shape[1:])
        for image, (left, top) in zip(images, corners, strict=True)
    ]
    assert torch.equal(crop(images, corners, padding), torch.stack(oracle))


KNOBS = {"rotation_degrees": 15.0, "translation_fraction": 0.1, "horizontal_flip": True, "crop_padding": 2}


@pytest.mark.parametrize("knobs", [KNOBS, {"horizontal_flip": True}, {"crop_padding": 2}])
def test_a_generator_makes_the_draws_reproducible_and_leaves_pytorchs_own_alone(knobs):
    images = random_batch((3, 12, 10), batch=16)[0]
    before = torch.get_rng_state()
    first, again, other = (augment(images, **knobs, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        own = augment(images, **knobs)
        torch.manual_seed(3)
        assert torch.equal(augment(images, **knobs), own)


@pytest.fixture
def captured(monkeypatch):
    """The arguments of the last call of affine."""
    arguments = {}

    def capture(images, angles, shifts, flips=None):
        arguments.update(angles=angles, shifts=shifts, flips=flips)
        return images

    monkeypatch.setattr(augmentation, "affine", capture)
    return arguments


def test_angles_and_shifts_fill_their_limits_and_stay_within(captured):
    images = torch.zeros(20_000, 1, 10, 40)
    augment(images, 15.0, 0.2, True, generator=torch.Generator().manual_seed(0))
    limits = {
        "angle": (captured["angles"], 15),
        "right": (captured["shifts"][:, 0], 8),
        "down": (captured["shifts"][:, 1], 2),
    }
    for name, (values, limit) in limits.items():
        assert values.abs().max() <= limit, name
        assert values.max() > 0.99 * limit, name
        assert values.min() < -0.99 * limit, name
        # mean and variance of a uniform distribution, to within 4 standard errors
        assert abs(values.mean()) < 4 * limit / 3**0.5 / len(values) ** 0.5, name
        assert values.var().item() == pytest.approx(limit**2 / 3, rel=0.03), name
    draws = torch.stack([values for values, _ in limits.values()] + [captured["flips"].float()])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 4 / len(images) ** 0.5
    assert captured["flips"].float().mean().item() == pytest.approx(0.5, abs=0.015)


def test_when_nothing_is_asked_for_the_same_tensor_comes_back_and_nothing_is_drawn():
    images = torch.rand(4, 1, 8, 8)
    before = torch.get_rng_state()
    assert augment(images) is images
    assert torch.equal(torch.get_rng_state(), before)


def test_a_flip_alone_mirrors_about_half_of_the_images_and_leaves_the_others():
    images = torch.rand(400, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    result = augment(images, horizontal_flip=True, generator=torch.Generator().manual_seed(1))
    mirrored = (result == images.flip(-1)).flatten(1).all(1)
    assert (mirrored | (result == images).flatten(1).all(1)).all()
    assert 160 < mirrored.sum() < 240  # 4 standard deviations


def test_a_crop_takes_each_place_as_often_as_the_others_and_leaves_the_image_unturned():
    one = torch.rand(1, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    result = augment(one.expand(25_000, -1, -1, -1), crop_padding=2, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(one[0], [2] * 4)
    counts = [
        (result == padded[:, top : top + 5, left : left + 7]).flatten(1).all(1).sum()
        for top in range(5)
        for left in range(5)
    ]
    assert sum(counts) == len(result)
    assert max(abs(count - 1000) for count in counts) < 4 * (1000 * 24 / 25) ** 0.5  # 4 standard deviations
