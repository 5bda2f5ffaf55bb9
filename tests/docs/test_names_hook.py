"""Names of parts in the text of an API page become links; code blocks, headings and other words do not."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("names_hook", DOCS / "hooks" / "names.py")
hook = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hook)

NAMES = {"ppm_loss": "densessl.losses.ppm_loss"}
LINK = '<autoref identifier="densessl.losses.ppm_loss" optional><code>{}</code></autoref>'


@pytest.mark.parametrize(
    ("html", "shown"),
    [
        ("see <code>ppm_loss</code>.", f"see {LINK.format('ppm_loss')}."),
        ("<code>densessl.ppm_loss</code>", LINK.format("densessl.ppm_loss")),
        ("<code>ppm_loss(x)</code> <code>mask</code>", "<code>ppm_loss(x)</code> <code>mask</code>"),
        ("<pre><code>ppm_loss</code></pre>", "<pre><code>ppm_loss</code></pre>"),
        ("<h2><code>ppm_loss</code></h2>", "<h2><code>ppm_loss</code></h2>"),
        ('<a href="#x"><code>ppm_loss</code></a>', '<a href="#x"><code>ppm_loss</code></a>'),
    ],
)
def test_names_in_text_become_links(html, shown):
    assert hook.linked(html, NAMES) == shown


def test_every_listed_part_is_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# a\n\n::: densessl.losses\n    options:\n      members:\n        - ppm_loss\n        - Loss\n\nText - word.\n"
        "\n::: densessl.ema\n    options:\n      members:\n        - EMA\n"
    )
    assert hook.documented(tmp_path) == NAMES | {"Loss": "densessl.losses.Loss", "EMA": "densessl.ema.EMA"}
    assert hook.documented(DOCS / "api")["PPM"] == "densessl.propagation.PPM"
