"""Logs and reports call a run as its user does."""

import sys
from types import SimpleNamespace

import pytest

from examples.pretrain import adapt, densecl, neco, own_method, pixcontrast, pixpro, pixpro_fpn, vit_posttrain
from examples.pretrain.common.known_as import known_as
from examples.pretrain.pixcontrast_instance import PixContrastInstance


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (pixpro, "PixPro"),
        (pixcontrast, "PixContrast"),
        (densecl, "DenseCL"),
        (neco, "NeCo"),
        (own_method, "OwnMethod"),
        (adapt, "adapt.py (PixContrast with an instance loss)"),
        (pixpro_fpn, "pixpro_fpn.py (PixPro at every level of a pyramid)"),
        (vit_posttrain, "vit_posttrain.py (dense post-training of a ViT)"),
    ],
)
def test_a_run_is_called_by_its_program_and_method(module, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(recipe=module.recipe, __file__=module.__file__))
    assert known_as(module.recipe().method) == name


def test_where_no_recipe_is_running_the_methods_file_is_named():
    assert known_as(PixContrastInstance) == "pixcontrast_instance.py (PixContrast with an instance loss)"


def test_a_class_without_a_file_is_named_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
    assert known_as(type("Mine", (), {"__module__": "__main__"})) == "Mine"
