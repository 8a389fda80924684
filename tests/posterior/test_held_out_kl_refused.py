"""What the held-out KL of laplace-torch's posteriors cannot be computed for, and what the message says then."""

from copy import deepcopy

import pytest
import torch
from laplace import ELLA, FunctionalLaplace, Laplace, VaLLA
from laplace.curvature import AsdlGGN, CurvlinopsHessian, CurvlinopsInterface
from laplace_torch_cases import CASES, FITTED, PRIOR, TEMPERATURE, N, data_of, fitted, loaders, problem, theirs
from posterior_cases import posterior_of
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from debiased_laplace import held_out_kl
from debiased_laplace.errors import NotFittedError, OverlapError

FULL_BATCH = {"n_data": N, "temperature": TEMPERATURE}


@pytest.fixture(autouse=True)
def no_long_work(monkeypatch):
    def sample_terms(*_):
        raise AssertionError("rows were asked for")

    monkeypatch.setattr("debiased_laplace.posterior.held_out_kl.sample_terms", sample_terms)


def judge(la, outside=range(20, N), inside=range(FITTED), **options):
    return held_out_kl(la, *loaders("classification", outside, inside), **{**FULL_BATCH, **options})


OVERLAPPING = {
    "by position": lambda d: Subset(d, [15, 16, 17]),
    "a copy": lambda d: TensorDataset(d.tensors[0][[3, 30]], d.tensors[1][[3, 30]]),
    "in another data set": lambda d: ConcatDataset([Subset(d, [30]), Subset(d, [0])]),
}


@pytest.mark.parametrize("overlapping", OVERLAPPING)
@pytest.mark.parametrize("case", ["Kronecker", "full of the last layer"])
def test_fitted_samples(case, overlapping):
    inside = loaders("classification")[1]
    outside = DataLoader(OVERLAPPING[overlapping](data_of("classification")))
    with pytest.raises(OverlapError, match=r"1 of the [23] samples of the loader were fitted"):
        held_out_kl(fitted(case, "classification"), outside, inside, **FULL_BATCH)


CALLS = {
    "fitted samples not given": (
        lambda la: held_out_kl(la, loaders("classification")[0], **FULL_BATCH),
        "do not store their samples: expected the fitted ones as fitted_loader",
    ),
    "one fitted sample too few": (
        lambda la: judge(la, inside=range(15)),
        "the 16 samples that were fitted; it yields 15",
    ),
    "one fitted sample too many": (lambda la: judge(la, inside=range(17)), "the 16 samples .* it yields 17"),
    "n_data without temperature": (
        lambda la: judge(la, temperature=None),
        r"expected the temperature of that one as well.*n / N \(here 0\.52\)",
    ),
    "n_data of fewer than fitted": (lambda la: judge(la, n_data=15), "must count the 16 samples .* got 15"),
    "temperature of zero": (lambda la: judge(la, temperature=0.0), "temperature must be a finite number above 0"),
    "nothing left to hold out": (
        lambda la: held_out_kl(la, *loaders("classification")),
        "All 16 samples were fitted.* pass its size as n_data, and the temperature",
    ),
    "nothing held out": (
        lambda la: held_out_kl(la, None, loaders("classification")[1], **FULL_BATCH),
        "16 of 40 samples",
    ),
    "more held out than there are": (
        lambda la: judge(la, n_data=20),
        "n_data leaves 4 samples out of the fit; the loader yields 20",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(call):
    function, message = CALLS[call]
    with pytest.raises(ValueError, match=message):
        function(fitted("diagonal", "classification"))


def test_ours_know_their_full_batch():
    la = posterior_of(problem("classification")[0], "classification", prior_precision=PRIOR, temperature=TEMPERATURE)
    with pytest.raises(NotFittedError):
        judge(la)
    la.fit(DataLoader(Subset(data_of("classification"), range(FITTED)), batch_size=8), n_data=N)
    for name, other in (("n_data", 41), ("temperature", 1.0)):
        with pytest.raises(ValueError, match=f"has {name}=.*; expected the same or None"):
            judge(la, **{name: other})


FUNCTIONAL = {
    "GP": lambda: FunctionalLaplace(problem("classification")[0], "classification", n_subset=5),
    "ELLA": lambda: ELLA(problem("classification")[0], "classification", 5, 3),
    "VaLLA": lambda: VaLLA(
        problem("classification")[0], "classification", inducing_locations=problem("classification")[1][:3]
    ),
    "a network": lambda: problem("classification")[0],
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_posteriors_without_parameters(name):
    with pytest.raises(ValueError, match=r"Functional posteriors \(GP, ELLA, VaLLA\) have no precision"):
        judge(FUNCTIONAL[name]())


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_not_fitted(subset, structure):
    la = Laplace(problem("classification")[0], "classification", subset, structure)
    with pytest.raises(NotFittedError, match="not fitted"):
        judge(la)


@pytest.mark.parametrize("case", ["diagonal", "Kronecker of the last layer", "full of a subnetwork out of order"])
def test_weights_that_have_changed(case):
    subset, structure, options = CASES[case]
    la = theirs("classification", subset, structure, **options)
    with torch.no_grad():
        list(la.model.parameters())[-1][0] += 1e-9
    with pytest.raises(ValueError, match="is not the model's present weights"):
        judge(la)


@pytest.mark.parametrize("what", ["weight", "buffer"])
def test_our_weights_that_have_changed(what):
    model = nn.Sequential(deepcopy(problem("classification")[0]), nn.BatchNorm1d(3)).double().eval()
    la = posterior_of(model, "classification", "subnetwork", subnetwork_indices=torch.arange(9))
    la.fit(DataLoader(Subset(data_of("classification"), range(FITTED)), batch_size=8), n_data=N)
    # not among the posterior's own parameters, but the network is another one
    changed = model[0][2].bias if what == "weight" else model[1].running_mean
    with torch.no_grad():
        changed[0] += 0.1
    with pytest.raises(ValueError, match="weights or buffers have changed since the fit"):
        la.held_out_kl(*loaders("classification"))


def test_a_precision_that_is_not_positive_definite():
    la = theirs("regression", structure="full", backend=CurvlinopsHessian, prior_precision=1e-3)
    with pytest.raises(ValueError, match="positive definite posterior precision; its smallest eigenvalue is -"):
        held_out_kl(la, *loaders("regression"), **FULL_BATCH)
    diagonal = theirs("regression")
    diagonal.prior_precision = -1000.0
    with pytest.raises(ValueError, match="to be positive and finite"):
        held_out_kl(diagonal, *loaders("regression"), **FULL_BATCH)


def test_a_last_layer_of_which_a_part_is_frozen():
    la = theirs("classification", "last_layer", "diag")
    la.model.last_layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"15 trainable parameters of last layer '2'.* is over 18"):
        judge(la)


def test_kronecker_factors_of_other_parameters():
    # ASDL's are zipped with the parameters whatever their number
    la = theirs("classification", structure="kron", backend=AsdlGGN)
    la.H.eigenvalues[0], la.H.eigenvalues[2] = la.H.eigenvalues[2], la.H.eigenvalues[0]
    la.H.eigenvectors[0], la.H.eigenvectors[2] = la.H.eigenvectors[2], la.H.eigenvectors[0]
    with pytest.raises(
        ValueError, match=r"sizes \(20, 5, 15, 3\); this posterior has factors of sizes \(15, 5, 20, 3\)"
    ):
        judge(la)


def test_a_backend_that_says_no_curvature():
    la = theirs("classification")
    la._backend_cls = CurvlinopsInterface
    with pytest.raises(ValueError, match="of the GGN, the EF or the Hessian; got one by CurvlinopsInterface"):
        judge(la)


def test_a_precision_of_no_known_form():
    class Own(type(fitted("diagonal", "classification"))):
        _key = ("all", "of this test")

        @property
        def posterior_precision(self):
            return "narrow"

    la = deepcopy(fitted("diagonal", "classification"))
    la.__class__ = Own
    with pytest.raises(ValueError, match="a diagonal, a dense matrix, Kronecker factors or a low-rank form; got str"):
        judge(la)
