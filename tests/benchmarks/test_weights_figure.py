"""The figure of the weights: its similarities, and that it is drawn."""

import torch
from torchvision.io import decode_image, write_png

from benchmarks.studies import weights_figure


def test_similarity_is_the_cosine_of_centred_features():
    features = torch.rand(5, 3, 4)
    found = weights_figure.similarity(features, (2, 1))
    mean = features.mean((1, 2))
    for row in range(3):
        for column in range(4):
            pair = features[:, 2, 1] - mean, features[:, row, column] - mean
            expected = torch.cosine_similarity(*pair, dim=0)
            torch.testing.assert_close(found[row, column], expected)


def test_the_figure_is_drawn_of_a_photo(tmp_path):
    write_png(torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8), str(tmp_path / "photo.png"))
    photo = weights_figure.read_photo(tmp_path / "photo.png", 70)
    assert photo.shape == (3, 40, 64)  # both sides whole cells
    weights_figure.main([str(tmp_path / "out.png"), "--photo", str(tmp_path / "photo.png"), "--width=70"])
    drawn = decode_image(str(tmp_path / "out.png"))
    assert drawn.shape[0] == 4
    assert drawn.float().std() > 10
    assert int(drawn[3].min()) == 255  # a white ground, readable on dark pages too
