"""Numbers and units in the site's tables stay together; text, code and links stay as they are."""

import importlib.util
from pathlib import Path

import pytest

HOOK = Path(__file__).parents[2] / "docs" / "hooks" / "tables.py"
spec = importlib.util.spec_from_file_location("tables_hook", HOOK)
hook = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hook)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("| 69.7 ms | 11.74 x |", "| 69.7&nbsp;ms | 11.74&nbsp;x |"),
        ("| 0.420 ± 0.000 | **0.2** ± **0.1** |", "| 0.420&nbsp;±&nbsp;0.000 | **0.2**&nbsp;±&nbsp;**0.1** |"),
        ("| 250 x 32 | 4 x |", "| 250&nbsp;x&nbsp;32 | 4&nbsp;x |"),
        ("| 2026-11-26 |", "| 2026&#8209;11&#8209;26 |"),
        ("| `--steps 3 s` takes 3 s |", "| `--steps 3 s` takes 3&nbsp;s |"),
        ("| 3 sets of 4 xylophones, 2 minutes |", "| 3 sets of 4 xylophones, 2&nbsp;minutes |"),
        ("In 2026-11-26 it took 3 s.", "In 2026-11-26 it took 3 s."),
        ("```\n| 3 s |\n```\n| 3 s |", "```\n| 3 s |\n```\n| 3&nbsp;s |"),
        ("~~~\n| 3 s |\n~~~\n| 3 s |", "~~~\n| 3 s |\n~~~\n| 3&nbsp;s |"),
        ("````\n```\n| 3 s |\n````\n| 3 s |", "````\n```\n| 3 s |\n````\n| 3&nbsp;s |"),
        ("~~~\n```\n| 3 s |\n~~~\n| 3 s |", "~~~\n```\n| 3 s |\n~~~\n| 3&nbsp;s |"),
        ("| ``a ` b 3 s`` takes 3 s |", "| ``a ` b 3 s`` takes 3&nbsp;s |"),
        ("| [3 s on 2026-11-26](at-2026-11-26.csv) |", "| [3&nbsp;s on 2026&#8209;11&#8209;26](at-2026-11-26.csv) |"),
        ('| [3 s](of-2026-11-26.csv "for 3 s") 3 s |', '| [3&nbsp;s](of-2026-11-26.csv "for 3 s") 3&nbsp;s |'),
        ("| <https://a.org/2026-11-26> 3 s |", "| <https://a.org/2026-11-26> 3&nbsp;s |"),
        ("| $4 x 3 s$ in 3 s |", "| $4 x 3 s$ in 3&nbsp;s |"),
        ("| 3 s cost $ 3 s, nothing more |", "| 3&nbsp;s cost $ 3&nbsp;s, nothing more |"),
    ],
)
def test_numbers_and_units_stay_together(written, shown):
    assert hook.on_page_markdown(written, page=None) == shown
