"""Random rotation, shift, flip and crop, drawn separately for each image of a batch, on the batch's device."""

import torch
from torch import Tensor
from torch.nn import functional as F


def affine(images: Tensor, angles: Tensor, shifts: Tensor, flips: Tensor | None = None) -> Tensor:
    """Rotate, shift and mirror each image about its centre, like torchvision's bilinear `affine` with zero fill.

    images: float, batch × channels × height × width. angles: degrees anticlockwise, batch. shifts: pixels to the right
    and down, batch × 2. flips: batch; where True, the image is first mirrored left to right.
    """
    height, width = images.shape[-2:]
    radians = torch.deg2rad(angles)[:, None, None]
    cos, sin, aspect = radians.cos(), radians.sin(), height / width
    # grid_sample asks where an output pixel comes from: the inverse map, in coordinates from -1 to 1 along each side.
    # Broadcast from batch × width and batch × height, since F.affine_grid's batched product is slower than sampling.
    x = torch.linspace(-1 + 1 / width, 1 - 1 / width, width, device=images.device) - shifts[:, :1] * (2 / width)
    y = torch.linspace(-1 + 1 / height, 1 - 1 / height, height, device=images.device) - shifts[:, 1:] * (2 / height)
    grid = images.new_empty(len(images), height, width, 2)
    torch.sub(cos * x[:, None, :], sin * aspect * y[:, :, None], out=grid[..., 0])
    torch.add(sin / aspect * x[:, None, :], cos * y[:, :, None], out=grid[..., 1])
    if flips is not None:
        grid[..., 0] *= 1 - 2 * flips.to(images.dtype)[:, None, None]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def crop(images: Tensor, corners: Tensor, padding: int) -> Tensor:
    """Pad images with zeros and crop them to their size. corners: the crop's first column and row, batch × 2."""
    height, width = images.shape[-2:]
    pieces = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    left, top = corners.unbind(1)  # pieces is a view: batch × channels × row × column × height × width
    return pieces[torch.arange(len(images), device=images.device), :, top, left]


def augment(
    images: Tensor,
    rotation_degrees: float = 0.0,
    translation_fraction: float = 0.0,
    horizontal_flip: bool = False,
    crop_padding: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a rotation, a shift, a flip and a crop for each image of a batch and apply them.

    images: float, batch × channels × height × width. The angle is uniform in ± `rotation_degrees`, the shift in
    ± `translation_fraction` of width and height. `horizontal_flip` mirrors each image with probability 1/2. The crop is
    torchvision's `RandomCrop(size, crop_padding)`. The default generator is PyTorch's; checkpoints save its state.
    """
    (batch, _, height, width), device = images.shape, images.device
    if rotation_degrees or translation_fraction:
        draws = torch.rand(4, batch, generator=generator, device=device)
        angles = (2 * draws[0] - 1) * rotation_degrees
        right, down = (2 * draws[1:3] - 1) * translation_fraction
        shifts = torch.stack([right * width, down * height], 1)  # not by a tensor: it would be copied every step
        images = affine(images, angles, shifts, draws[3] < 0.5 if horizontal_flip else None)
    elif horizontal_flip:
        flips = torch.rand(batch, generator=generator, device=device) < 0.5
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
    if crop_padding:
        corners = torch.randint(2 * crop_padding + 1, (batch, 2), generator=generator, device=device)
        images = crop(images, corners, crop_padding)
    return images
