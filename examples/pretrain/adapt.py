"""Goes on from a pretrained CNN: PixContrast + InfoNCE, held to its start. Measured in docs/adapt.md.

    python examples/pretrain/adapt.py fit --data.folder FOLDER --config examples/pretrain/configs/own_images.yaml

Without a configuration it has the settings that were measured, for a map of stride 16: views of 128 px, 250 steps of
32 images. Three things differ from training from random weights. Batch norm keeps the statistics of the start, because
those of augmented crops do not fit whole images. A Gram anchor keeps the similarities between an image's cells. AdamW
with a small rate for the backbone takes the place of LARS, whose published rates are made for random weights.
"""

from examples.pretrain.pixcontrast_instance import PixContrastInstance


def recipe():
    from examples.pretrain.common.cli import Recipe
    from examples.pretrain.common.optimizers import BackboneAdamW

    defaults = {
        "backbone.init": "imagenet",
        "backbone.freeze_statistics": True,
        "method.anchor": 20.0,
        "method.hidden_dim": 512,
        "method.dim": 128,
        "optimizer.lr_backbone": 2e-4,
        "optimizer.lr_head": 2e-3,
        "optimizer.weight_decay": 0.01,
        "data.size": 128,
        "data.batch_size": 32,
        "data.scale": (0.2, 1.0),
        "trainer.max_steps": 250,
    }
    return Recipe(PixContrastInstance, BackboneAdamW, defaults=defaults)


if __name__ == "__main__":
    recipe().run()
