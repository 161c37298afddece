"""Code length of images under general compressors, as a measure of their complexity.

Notation: N images of C = 1 or 3 channels.
"""

import io
import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["code_length", "is_image_shape"]


def is_image_shape(event_shape: tuple[int, ...]) -> bool:
    """Return whether examples are images (1, H, W) or (3, H, W)."""
    return len(event_shape) == 3 and event_shape[0] in (1, 3)


def code_length(images: Tensor) -> Tensor:
    """Return the shorter of the PNG and lossless WebP files of each image, in nats, (N,), float64.

    Args:
        images: (N, C, H, W) in [0, 1], of which 8 bits are kept.

    Raises:
        ValueError: If the shape is not that of images, or values lie outside [0, 1].

    Source: J. Serrà et al. (2020), Input complexity and out-of-distribution detection with likelihood-based
    generative models, arXiv:1909.11480.

    Example:
        >>> bool(code_length(torch.rand(1, 1, 28, 28)) > code_length(torch.zeros(1, 1, 28, 28)))
        True
    """
    if not is_image_shape(tuple(images.shape[1:])) or not ((images >= 0) & (images <= 1)).all():
        raise ValueError(
            "input complexity compresses images (N, 1 or 3, H, W) with values in [0, 1]; got shape "
            f"{tuple(images.shape)}, {float(images.min()):.3g} to {float(images.max()):.3g}: choose another "
            'score, such as "statistics"'
        )
    from PIL import Image  # noqa: PLC0415 (slow)

    pixels = (images.cpu() * 255).round().to(torch.uint8)
    modes = ["PNG", "WEBP"] if "WEBP" in Image.registered_extensions().values() else ["PNG"]
    pictures = [Image.fromarray(_layout(image).numpy()) for image in pixels]
    sizes = [min(_size(picture, mode) for mode in modes) for picture in pictures]
    return torch.tensor(sizes, dtype=torch.float64) * 8 * math.log(2)


def _layout(image: Tensor) -> Tensor:
    return image[0] if len(image) == 1 else image.permute(1, 2, 0).contiguous()


def _size(picture: Any, mode: str) -> int:
    """Return the bytes of a file at the compressor's best."""
    options = {"optimize": True} if mode == "PNG" else {"lossless": True, "quality": 100, "method": 4}
    file = io.BytesIO()
    picture.save(file, mode, **options)
    return file.tell()
