"""The table of methods: every link leads to a documented part, and every recipe uses the parts of its row."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = {match[1]: match[0] for match in re.finditer(r"^\| .*, `(\w+)\.py` \|.*$", PAGE, re.MULTILINE)}
LINK = re.compile(r"\]\((api/\w+\.md)#densessl\.([\w.]+)\.(\w+)\)")


def test_links_lead_to_documented_names():
    links = LINK.findall(PAGE)
    assert len(links) > 20
    for page, module, name in links:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert f"::: densessl.{module}\n" in text, page
        assert f"        - {name}\n" in text, name


def test_the_published_methods_have_rows():
    published = {"pixpro", "pixcontrast", "pixpro_instance", "densecl", "vicregl", "detcon", "slotcon"}
    assert published | {"paka", "neco", "ibot_cross_view"} <= set(ROWS)


def owner(configuration: Path) -> str | None:
    """The recipe of it, ``pixpro_fpn`` and not ``pixpro`` of ``pixpro_fpn_r50.yaml``."""
    return max((recipe for recipe in ROWS if configuration.name.startswith(f"{recipe}_")), key=len, default=None)


def test_a_configuration_belongs_to_the_longest_name():
    names = {"pixpro_r50_100ep.yaml": "pixpro", "pixpro_fpn_r50.yaml": "pixpro_fpn", "own_images.yaml": None}
    assert {name: owner(Path(name)) for name in names} == names


@pytest.mark.parametrize("recipe", sorted(ROWS))
def test_a_recipe_uses_the_parts_of_its_row(recipe):
    folder = ROOT / "examples" / "pretrain"
    code = (folder / f"{recipe}.py").read_text(encoding="utf-8")
    views = {"byol_views", "mocov2_views", "simclr_views", "multicrop_views"}
    for name in {name for _, _, name in LINK.findall(ROWS[recipe])} - views:
        assert re.search(rf"\b{name}\(", code), name
    (preset,) = views & {name for _, _, name in LINK.findall(ROWS[recipe])}
    configurations = [
        path.read_text(encoding="utf-8") for path in (folder / "configs").glob("*.yaml") if owner(path) == recipe
    ]
    assert configurations
    # The default of the data module is BYOL's.
    assert any(re.search(rf"preset: {preset.removesuffix('_views')}\b", text) for text in configurations) or (
        preset == "byol_views" and not any("preset:" in text for text in configurations)
    )
