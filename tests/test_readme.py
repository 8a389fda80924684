"""Every line of code in the README runs as it stands there."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    # a network that is trained for a moment is enough to see the lines run
    exec(code.replace('torch.device("cpu"))', 'torch.device("cpu"), epochs=2)'), {})
    assert "fitted on drawn rows of 128 of 1200 samples" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.json", "report.md"}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
