"""The code of the page on how much data is enough runs as it stands there."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "how_much_data.md"


def test_the_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    # a network that is trained for a moment, and some of the samples, are enough to see the lines run
    code = code.replace('torch.device("cpu"))', 'torch.device("cpu"), epochs=2)')
    code = code.replace("DataLoader(data.train,", "DataLoader(torch.utils.data.Subset(data.train, range(300)),")
    first, second = code.split("\n\nla.fit(loader, override=False")
    exec(first, names)
    one = names["la"].stopping
    assert capsys.readouterr().out == f"{one}\n"
    assert one.tolerance == 15
    exec("la.fit(loader, override=False" + second, names)
    two = names["la"].stopping
    assert capsys.readouterr().out == f"{two}\n"
    assert two.stages[0].n_samples == one.stages[-1].n_samples


def test_what_it_prints_is_in_the_words_of_the_package():
    (printed,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    number = r"-?[\d.]+(?:e[+-]\d+)?"
    gained = rf"gained {number} ± {number} nats"
    line = (
        rf"stopped: doubling from \d+ to \d+ samples {gained}, less than the tolerance of {number} by over two "
        r"standard errors\."
    )
    assert re.fullmatch(rf"(?:{line}\n(?:  \d+ samples: {gained}\n)+)+", printed)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
