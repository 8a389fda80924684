"""The code of the page that a newcomer starts with runs as it stands there."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "get_started.md"


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    # a network that is trained for a moment, and some of the samples, are enough to see the lines run
    code = code.replace('torch.device("cpu"))', 'torch.device("cpu"), epochs=2)')
    exec(code.replace("data.held_out,", "torch.utils.data.Subset(data.held_out, range(24)),"), names)
    printed = capsys.readouterr().out
    assert "fitted on drawn rows of 128 of 1200 samples" in printed
    assert "KLDifference(" in printed
    assert names["probabilities"].shape == (len(names["data"].test_inputs), 10)
    assert names["samples"].shape == (10, 3254)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.json", "report.md"}
