"""The code of the page on tuning the prior runs as it stands there."""

import re
import warnings
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "prior_tuning.md"


def test_the_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    # a network that is trained for a moment, and few priors, are enough to see the lines run
    code = code.replace('torch.device("cpu"))', 'torch.device("cpu"), epochs=2)').replace("grid_size=26", "grid_size=3")
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The best prior precision|Even the best")
        exec(code, names)
    search = names["la"].prior_search
    assert capsys.readouterr().out == f"{search}\n"
    assert search.n == 300
    assert search.map_loss > 0


def test_what_it_prints_is_in_the_words_of_the_package():
    (printed,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    number = r"[-+]?[\d.]+(?:e[+-]\d+)?"
    assert re.fullmatch(
        rf"prior precision {number}, the best of 26 from 0\.1 to 1e\+04, on 300 validation samples\n"
        rf"  negative log-likelihood {number} ± {number}\n"
        rf"  better than the plain network \(MAP\): negative log-likelihood {number} against {number}, a "
        rf"paired difference of {number} ± {number}\n",
        printed,
    )
