"""Names in published files, whatever version of transformers is installed."""

import pytest

from lowmem_db.models.names import published_name


@pytest.mark.parametrize(
    ("component", "path", "published"),
    [
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("text_encoder_2", "embeddings.token_embedding", "text_model.embeddings.token_embedding"),
        ("text_encoder", "text_model.final_layer_norm", "text_model.final_layer_norm"),
        ("text_encoder_2", "text_projection.weight", "text_projection.weight"),
        ("text_encoder", "encoder.block.0.layer.0", "encoder.block.0.layer.0"),  # T5's
        ("unet", "encoder.layers.0", "encoder.layers.0"),
    ],
)
def test_clip_s_names_alone_get_their_prefix_back(component: str, path: str, published: str) -> None:
    assert published_name(component, path) == published
