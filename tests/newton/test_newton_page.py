"""The code of the page on Newton steps."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "newton_steps.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    exec("\n".join(blocks), {})
    printed = capsys.readouterr().out
    assert "NewtonStep(3254 parameters" in printed
    assert "nan" not in printed
