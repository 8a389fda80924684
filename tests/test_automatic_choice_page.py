"""The code of the page on the automatic choice runs as it stands there."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "automatic_choice.md"


def test_the_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    # a network that is trained for a moment, and some of the samples, are enough to see the lines run
    code = code.replace('torch.device("cpu"))', 'torch.device("cpu"), epochs=2)')
    exec(
        code.replace("DataLoader(data.curvature,", "DataLoader(torch.utils.data.Subset(data.curvature, range(16)),"),
        names,
    )
    la = names["la"]
    assert capsys.readouterr().out == f"{la}\n{la.choice}\n"
    assert la.split.n_samples == la.choice.n_samples == 16
    assert {r.trial.options.magnitudes for r in la.choice.runners_up} >= {"held_out", "same_batch"}


def test_what_it_prints_is_in_the_words_of_the_package():
    (printed,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    options = r"magnitudes='\w+'(, direction_samples=0\.5)?, rank=(\d+|None), complement='kron'"
    first, chosen, *others = printed.splitlines()
    assert re.fullmatch(r"DebiasedLowRankLaplace\(classification, .* fitted on 128 of 1200 samples\)", first)
    assert re.fullmatch(rf"chosen by held-out KL on 64 samples \(optimistic\): {options}", chosen)
    assert len(others) == 3 * 4 - 1
    for line in others:
        assert re.fullmatch(rf"  \+ [\d.]+ ± [\d.]+ nats: {options}", line), line


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
