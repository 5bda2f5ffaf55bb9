"""The weights that come with the package: found, loaded without a network, refused by name."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hubconf
from benchmarks.studies.compare import make_backbone
from densessl import FeatureMap, hub

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Weights of two networks in place of the package's own."""
    torch.manual_seed(3)
    for name in ("first_r10_study", "second_r10_study"):
        save_file(hub.r10().state_dict(), tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(hub, "_folder", lambda: tmp_path)
    return tmp_path


def test_the_network_is_that_of_the_study():
    theirs, ours = make_backbone().state_dict(), hub.r10().state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert hub.r10()(torch.rand(2, 3, 64, 96)).shape == (2, 128, 8, 12)


def test_a_name_loads_its_weights_in_eval_mode(folder):
    assert hub.list_models() == ["first_r10_study", "second_r10_study"]
    model, stored = hub.load("second_r10_study"), load_file(folder / "second_r10_study.safetensors")
    assert isinstance(model, FeatureMap)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    expected = make_backbone().eval()
    expected.load_state_dict(stored)
    image = torch.rand(1, 3, 80, 48)
    torch.testing.assert_close(model(image), expected(image))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_loads_as_well(folder, kind):
    path = kind(folder / "first_r10_study.safetensors")
    assert torch.equal(hub.load(path).conv1.weight, hub.load("first_r10_study").conv1.weight)
    assert not torch.equal(hub.load(path).conv1.weight, hub.load("second_r10_study").conv1.weight)


def test_an_unknown_name_is_answered_with_the_names(folder):
    with pytest.raises(ValueError, match=r"^name: expected one of first_r10_study, second_r10_study or .*'resnet50'$"):
        hub.load("resnet50")
    with pytest.raises(ValueError, match=r"'frist_r10_study'; did you mean first_r10_study\?$"):
        hub.load("frist_r10_study")
    with pytest.raises(ValueError, match=r"^name: expected one of .*safetensors.*, got 'last.ckpt'$"):
        hub.load("last.ckpt")
    with pytest.raises(ValueError, match=r"^name: expected one of .*, got None$"):
        hub.load(None)


def test_a_copy_without_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_folder", lambda: tmp_path / "none")
    assert hub.list_models() == []
    with pytest.raises(ValueError, match=r"^name: expected the path of .* \(this copy .* no weights\), got 'first'$"):
        hub.load("first")


def test_a_file_that_does_not_fit_is_refused_by_its_entry(folder):
    whole = load_file(folder / "first_r10_study.safetensors")
    lacking = {name: value for name, value in whole.items() if name != "layer2.0.conv2.weight"}
    wide = whole | {"layer1.0.conv1.weight": torch.zeros(64, 32, 3, 3)}
    for entries, said in ((lacking, "'layer2.0.conv2.weight' is missing"), (wide, r"\(64, 32, 3, 3\), expected")):
        save_file(entries, folder / "other.safetensors")
        with pytest.raises(
            ValueError, match=rf"^path: .*other.safetensors does not fit the network of densessl.hub: .*{said}"
        ):
            hub.load(folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"there is no file .*absent.safetensors"):
        hub.load(folder / "absent.safetensors")


def test_without_safetensors_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'densessl\[export\]'"):
        hub.load("first_r10_study")


def test_the_weights_of_this_repository_are_whole_and_small():
    names = hub.list_models()
    assert {"pixpro_r10_study", "pixpro_infonce_r10_study", "untrained_r10_study"} <= set(names)
    files = {name: ROOT / "weights" / f"{name}.safetensors" for name in names}
    assert all(path.stat().st_size <= 2.8e6 for path in files.values())
    assert sum(path.stat().st_size for path in files.values()) <= 12e6
    card = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    for name in names:
        features = hub.load(name)(torch.rand(1, 3, 64, 64))
        assert features.shape == (1, 128, 8, 8)
        assert features.isfinite().all()
        assert float(features.flatten(2).std(2).mean()) > 0  # the cells differ
        assert f"| `{name}` |" in card


def test_torch_hub_takes_them_from_a_clone():
    model = torch.hub.load(str(ROOT), "pixpro_r10_study", source="local")
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(image), hub.load("pixpro_r10_study")(image))
    assert not model.training
    fresh = torch.hub.load(str(ROOT), "pixpro_r10_study", source="local", pretrained=False)
    assert not torch.equal(fresh.conv1.weight, model.conv1.weight)
    assert not fresh.training
    public = {name: value for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert sorted(public) == hub.list_models()  # what torch.hub.list shows
    assert all(entry.__name__ == name and name in entry.__doc__ for name, entry in public.items())
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)
