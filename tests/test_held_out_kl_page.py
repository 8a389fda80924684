"""The code of the page on the held-out KL runs as it stands there."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "held_out_kl.md"


def test_the_code_runs(capsys):
    code, of_all = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    # a network that is trained for a moment, and some of the samples, are enough to see the lines run
    code = code.replace('torch.device("cpu"))', 'torch.device("cpu"), epochs=2)')
    exec(code.replace("data.held_out,", "torch.utils.data.Subset(data.held_out, range(24)),"), names)
    assert f"KLDifference(value={names['a'].value - names['b'].value}" in capsys.readouterr().out
    assert names["a"].context == names["b"].context
    assert (names["a"] - names["b"]).standard_error < names["a"].standard_error
    # some of the data are all of them here
    some = "everything = DataLoader(torch.utils.data.Subset(data.train, range(60)), batch_size=30)"
    exec(of_all.replace("everything = DataLoader(data.train, batch_size=64)", some), names)
    assert "KLDifference" in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
