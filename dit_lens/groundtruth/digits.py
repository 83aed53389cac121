"""The reader of the digits that `digits` draws: which digit an image shows, by a small classifier.

It is the judge of docs/digits.md: a convolutional network that learned from the images that the
bundled model was trained on, 98.6 % right on 2,000 MNIST digits that neither has seen.
`examples/evaluate_reference.py` trains it; its weights are kept here, in half precision.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidValue

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class Classifier(nn.Module):
    """Images [n, 1, 16, 16] in [-1, 1] -> logits [n, 10]; `features` are the 64 numbers before the
    last layer.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide_in, wide_out, stride in [
            (1, 32, 1),
            (32, 32, 2),
            (32, 64, 1),
            (64, 64, 2),
            (64, 128, 1),
        ]:
            conv = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(wide_out), nn.ReLU()]
        self.features = nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 64), nn.ReLU()
        )
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.features(x))
        return logits


def read(images: Tensor) -> Tensor:
    """How probable each digit is, to the classifier.

    >>> read(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 10])

    Args:
        images: [n, 1, 16, 16] in [0, 1].

    Returns:
        [n, 10], each row of sum 1.

    Raises:
        InvalidType: `images` is not a tensor of floating-point numbers.
        InvalidValue: another shape, or values that are not finite.
    """
    arguments.tensor("images", images, (None, 1, 16, 16), finite=True)
    if not len(images):
        raise InvalidValue("images is empty; expected one image or more.")
    with torch.no_grad():
        return reader()(images.detach().float().cpu() * 2 - 1).softmax(1)


@functools.cache
def reader() -> Classifier:
    """The classifier itself, with its stored weights."""
    with torch.random.fork_rng(devices=[]):  # the layers draw initial weights
        reader = Classifier()
    stored = {name: value.float() for name, value in load_file(WEIGHTS).items()}
    counts = {n: v for n, v in reader.state_dict().items() if n.endswith("num_batches_tracked")}
    reader.load_state_dict(stored | counts)
    return reader.eval().requires_grad_(False)
