"""EfficientNet-Lite0 (arXiv:1905.11946, without squeeze-and-excitation and with ReLU6), up to its pooled features.

Its parameters have the names of the published weights, so that these load unchanged.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_BATCH_NORM_EPS = 1e-3
_STEM_CHANNELS = 32
NUM_FEATURES = 1280
_STAGES = (
    # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """From pictures to 1280 features: the mean of the last convolution over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SamePaddedConv(3, _STEM_CHANNELS, 3, stride=2)
        self._bn0 = _batch_norm(_STEM_CHANNELS)
        self._blocks = nn.ModuleList(_blocks())
        self._conv_head = _SamePaddedConv(_STAGES[-1][-1], NUM_FEATURES, 1)
        self._bn1 = _batch_norm(NUM_FEATURES)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1280"]:
        """Return the features of normalised pictures."""
        hidden = functional.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            hidden = block(hidden)
        return functional.relu6(self._bn1(self._conv_head(hidden))).mean(dim=(2, 3))


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added if the shapes match."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds_input = stride == 1 and inputs == outputs
        if expansion > 1:
            self._expand_conv = _SamePaddedConv(inputs, hidden, 1)
            self._bn0 = _batch_norm(hidden)
        self.expands = expansion > 1
        self._depthwise_conv = _SamePaddedConv(hidden, hidden, kernel, stride=stride, groups=hidden)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = _SamePaddedConv(hidden, outputs, 1)
        self._bn2 = _batch_norm(outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu6(self._bn0(self._expand_conv(inputs))) if self.expands else inputs
        hidden = functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + inputs if self.adds_input else hidden


class _SamePaddedConv(nn.Conv2d):
    """A convolution padded as in TensorFlow: an odd pixel is added on the right and at the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in input.shape[2:])
        padded = functional.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(padded)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS)


def _blocks() -> list[_Block]:
    blocks = []
    inputs = _STEM_CHANNELS
    for count, kernel, stride, expansion, outputs in _STAGES:
        for index in range(count):
            first = stride if index == 0 else 1
            blocks.append(_Block(inputs, outputs, kernel=kernel, stride=first, expansion=expansion))
            inputs = outputs
    return blocks


def normalise(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Normalise pictures with values in [0, 255] for the network."""
    return (pixels - 127.0) / 128.0
