"""Entry points of torch.hub, one a file of weights: ``torch.hub.load(CLONE, "pixpro_r10_study", source="local")``.

They are the names of ``densessl.hub.list_models()``.
"""

from densessl import hub as _hub

dependencies = ["einops", "safetensors", "torch", "torchvision"]


def _entry(_name):
    def entry(pretrained=True):
        return _hub.load(_name) if pretrained else _hub.r10().eval()

    entry.__name__ = entry.__qualname__ = _name
    entry.__doc__ = f"""The encoder {_name} of densessl's study as a FeatureMap in eval mode, 128 channels at stride 8.

    What it has seen and how well it does: weights/README.md.

    Args:
        pretrained: Whether to load its weights; False gives the same network with random ones.
    """
    return entry


globals().update({_name: _entry(_name) for _name in _hub.list_models()})
