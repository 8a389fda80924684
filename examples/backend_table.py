"""Writes docs/backends.md: its table is the one that tests/posterior/test_backends.py runs through.

Run after changing the cases: `python examples/backend_table.py`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "backends.md"
sys.path[:0] = [str(ROOT / "tests" / "posterior")]

from backend_cases import ARCHITECTURES, BACKENDS, CASES, LIKELIHOODS, OWN_FACTORS, OWN_ROWS, STRUCTURES, SUBSETS

INTRODUCTION = """\
# Backends

<!-- Written by examples/backend_table.py from the cases of tests/posterior/test_backends.py: change those. -->

`backend=` takes laplace-torch's own classes. `backend=None`, the default, is torch.func.

**What a backend picks.** Which curvature the posterior has: the GGN (`CurvlinopsGGN`, `BackPackGGN`, `AsdlGGN`), the
empirical Fisher of the negative log-likelihood (`…EF`; laplace-torch's own is twice as large in regression) or the
Hessian of the loss (`…Hessian`; negative curvature along a direction is floored at 0). With
`backend_kwargs={"stochastic": True, "num_samples": m}` a GGN backend stands for the Monte-Carlo GGN with m targets a
sample, drawn from the model itself.

**Who computes.** With `sampling="curvature"`, the default, torch.func: drawn rows are no method of a backend. With
`sampling="uniform"`, of which the rest of this page is, the backend, where it is right: its `jacobians` or
`last_layer_jacobians` (GGN), its `gradients` (empirical Fisher), its `full` (Hessian), and with `kron_basis="kfac"` its
`kron`. Otherwise torch.func computes the same curvature. A `UserWarning` then says why, and `la.curvature_source` says
who it was in any case. The rows of a Monte-Carlo GGN are always torch.func's: its draws follow `seed`. The standard
errors of Hessian magnitudes are torch.func's as well.

**What is verified at `fit`.** Rows and Hessians on two samples and Kronecker factors on up to eight are compared with
torch.func's before any is used, at every fit, so that a model which a backend does not understand is noticed. Drawn
factors cannot be compared; the backend's exact ones on the same model are, in their place. A backend works on copies of
the model: no hook, attribute or gradient of yours is touched.

**What predictions use.** torch.func, whatever the backend: `la(x)`, sampling, tuning of the prior and `held_out_kl`
never call it.

**What is refused.** Backends of the old asdfghjkl package, instances in place of classes, `stochastic` or
`num_samples` with an empirical Fisher or a Hessian, `num_samples` without `stochastic=True` or below 1, and any other
entry of `backend_kwargs` (`last_layer` and `subnetwork_indices` follow from `subset_of_weights`).
"""

OF_CELLS = """\
## Structures, subsets and likelihoods

A network of linear layers. Each cell says which of the backend's methods compute; every one of them, for
classification, regression with one and with three outputs, and reward modeling, is compared with a dense
transcription of the method in double precision. "K-FAC" is `kron_basis="kfac"` with `kron_magnitudes="kronecker"`; with
`subset_of_weights="subnetwork"` parameters of which only some entries are selected have the exact diagonal instead.
"""

OF_ARCHITECTURES = """\
## Architectures

Classification, all weights. The backends named compute rows (or the Hessian) and K-FAC's factors themselves; for all
others torch.func computes, with a warning.
"""


def text() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, OF_CELLS, *_cells(), "", OF_ARCHITECTURES, *_architectures(), ""])


def _cells() -> list[str]:
    lines = [_row("backend", "curvature", "weights", *(_column(s) for s in STRUCTURES)), _row(*["---"] * 7)]
    for backend, chosen in BACKENDS.items():
        for subset in SUBSETS:
            whos = [[CASES[backend, s, subset, likelihood] for likelihood in LIKELIHOODS] for s in STRUCTURES]
            lines.append(_row(_backend(backend), chosen.kind, subset, *(_cell(who) for who in whos)))
    return lines


def _cell(whos: list) -> str:
    """Who computes for most likelihoods, and for which others somebody else."""
    words = [" + ".join([*(f"`{m}`" for m in who.methods), *["torch.func"] * who.torch_func]) for who in whos]
    usual = max(dict.fromkeys(words), key=words.count)
    others = [f"{likelihood}: {said}" for likelihood, said in zip(LIKELIHOODS, words, strict=True) if said != usual]
    return f"{usual} ({'; '.join(others)})" if others else usual


def _architectures() -> list[str]:
    lines = [_row("model", "rows or Hessian", "K-FAC's factors"), _row(*["---"] * 3)]
    for name in ARCHITECTURES:
        lines.append(
            _row(name, *(", ".join(_backend(b) for b in own[name]) or "none" for own in (OWN_ROWS, OWN_FACTORS)))
        )
    return lines


def _backend(name: str) -> str:
    cls, *stochastic = name.split(", ")
    return ", ".join([f"`{cls}`", *stochastic])


def _column(structure: str) -> str:
    return structure.replace("kron, K-FAC's factors", "kron, K-FAC")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(text())
