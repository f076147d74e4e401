"""Augmentation on a batch, against torchvision image by image."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from lablib.augmentation import affine, augment, crop

SHAPES = [(1, 28, 28), (3, 28, 28), (1, 20, 32), (3, 33, 18)]


def random_images(shape, batch=6):
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_flips", [False, True])
def test_affine_is_torchvisions_image_by_image(shape, with_flips):
    images, generator, flips = random_images(shape), torch.Generator().manual_seed(0), torch.arange(6) % 2 == 1
    angles = torch.rand(6, generator=generator) * 80 - 40
    shifts = torch.rand(6, 2, generator=generator) * 6 - 3  # pixels
    result = affine(images, angles, shifts, flips if with_flips else None)
    originals = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images) if with_flips else images
    oracle = [
        # torchvision turns clockwise
        transforms.affine(image, -angle.item(), shift.tolist(), 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)
        for image, angle, shift in zip(originals, angles, shifts, strict=True)
    ]
    torch.testing.assert_close(result, torch.stack(oracle), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [1, 4])
def test_crop_is_torchvisions_padding_and_cropping_image_by_image(shape, padding):
    images = random_images(shape)
    corners = torch.randint(2 * padding + 1, (len(images), 2), generator=torch.Generator().manual_seed(0))
    oracle = [
        transforms.crop(transforms.pad(image, [padding]), top.item(), left.item(), *shape[1:])
        for image, (left, top) in zip(images, corners, strict=True)
    ]
    assert torch.equal(crop(images, corners, padding), torch.stack(oracle))


def test_the_draws_are_uniform_for_each_image_in_the_order_in_which_the_published_runs_drew_them():
    images = random_images((3, 12, 10), batch=16)
    generator = torch.Generator().manual_seed(3)
    turn, right, down, flip = torch.rand(4, 16, generator=generator)  # uniform in 0 to 1
    corners = torch.randint(5, (16, 2), generator=generator)  # 0 to twice the padding
    shifts = torch.stack([(2 * right - 1) * 0.1 * 10, (2 * down - 1) * 0.1 * 12], dim=1)  # of the width and the height
    expected = crop(affine(images, (2 * turn - 1) * 15, shifts, flip < 0.5), corners, 2)
    result = augment(images, 15.0, 0.1, True, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)

    flips = (torch.rand(16, generator=generator.manual_seed(3)) < 0.5).tolist()
    expected = torch.stack([image.flip(-1) if flip else image for image, flip in zip(images, flips, strict=True)])
    assert 0 < sum(flips) < 16
    assert torch.equal(augment(images, horizontal_flip=True, generator=generator.manual_seed(3)), expected)
