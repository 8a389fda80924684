"""The limit of memory that a posterior is given."""

import re

import pytest
import torch
from laplace.curvature import CurvlinopsHessian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.memory import LEAST
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.debiasing.memory import bytes_beyond_rows
from debiased_laplace.linalg.vector_format import is_on_disk

FEW = 20_000
"""Bytes: less than the rows of the samples, and than a dense matrix of the parameters."""


def fitted(*, width=12, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()
    X, y = torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 3
    options = {"sampling": "uniform", **options}
    la = DebiasedLaplace(model, "classification", prior_precision=3.0, **options)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=16))
    return la, X


@pytest.fixture
def _tiny_limits(monkeypatch):
    monkeypatch.setattr("debiased_laplace.posterior.laplace.LEAST", 1)
    monkeypatch.setattr("debiased_laplace.debiasing.memory.CHUNK_BYTES", 0)


@pytest.mark.usefixtures("_tiny_limits")
@pytest.mark.parametrize("magnitudes", ["same_batch", "held_out", "cross_fitted"])
def test_products_take_the_place_of_rows_that_do_not_fit(magnitudes):
    options = {"rank": 6, "complement": "diagonal", "magnitudes": magnitudes}
    plenty, X = fitted(solver="gram", **options)
    little, _ = fitted(memory=FEW, **options)
    assert plenty.fit_result.estimate.outcome.solver != "lanczos"
    assert little.fit_result.estimate.outcome.solver == "lanczos"
    torch.testing.assert_close(little.directional_curvatures, plenty.directional_curvatures, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(little(X), plenty(X), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("_tiny_limits")
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 12},
        {"rank": 12, "magnitudes": "held_out"},
        {"rank": 12, "magnitudes": "same_batch", "complement": "isotropic"},
        {"rank": 30, "complement": "diagonal"},
        {"rank": None, "complement": "none"},
        {"hessian_structure": "kron"},
        {"hessian_structure": "full"},
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_computed_a_few_parameters_at_a_time(sampling, options, monkeypatch):
    options = {"width": 200, "sampling": sampling, "n_rows": 60, **options}
    plenty, X = fitted(**options)
    rows = plenty.rows.n if sampling == "curvature" else 60
    rows = rows // 2 if options.get("magnitudes") == "held_out" else rows
    groups = []
    compute = RowCurvature._rows_of
    monkeypatch.setattr(RowCurvature, "_rows_of", lambda self, chosen: groups.append(chosen) or compute(self, chosen))
    taken = sum(bytes_beyond_rows(plenty.fit_result.network, plenty.fit_result.options).values())
    little, _ = fitted(memory=taken + rows * 8 * 500, **options)
    assert len(set(groups) - {None}) > 1
    assert little.fit_result.estimate.outcome.solver == plenty.fit_result.estimate.outcome.solver
    # vectors of a Kronecker basis that a fold's other samples do not determine depend on the rounding
    in_basis = "kron" in (plenty.fit_result.options.complement or "kron", plenty.fit_result.options.structure)
    tolerance = {"rtol": 1e-3 if in_basis else 1e-6, "atol": 1e-9}
    torch.testing.assert_close(little(X), plenty(X), **tolerance)
    if plenty.rank:
        torch.testing.assert_close(little.directional_curvatures, plenty.directional_curvatures, **tolerance)


@pytest.mark.usefixtures("_tiny_limits")
def test_what_does_not_fit_is_refused_with_the_way_out():
    la, _ = fitted(rank=6, complement="diagonal", memory=FEW)
    with pytest.raises(ValueError, match=r"available memory .*expected fewer parameters, more memory"):
        _ = la.posterior_covariance
    with pytest.raises(ValueError, match=r"hessian_structure='full' .* available memory"):
        fitted(hessian_structure="full", memory=FEW)


@pytest.mark.usefixtures("_tiny_limits")
@pytest.mark.parametrize("options", [{"rank": 6}, {"hessian_structure": "kron"}], ids=str)
def test_sides_whose_eigenvectors_do_not_fit_keep_their_axes(options):
    with pytest.warns(UserWarning, match=r"Eigenvectors .* longer than 5 keep their axes"):
        little, _ = fitted(memory=FEW, **options)
    basis = little.fit_result.estimate.curvature.basis
    assert [(block.left is None, block.right is None) for block in basis.blocks] == [
        (True, False),  # 12 x 5
        (True, True),
        (False, True),  # 3 x 12
        (False, True),
    ]
    # the trace of the curvature is that of any other basis
    plenty, _ = fitted(**options)
    traces = [la.posterior_precision.to_dense().trace() for la in (little, plenty)]
    torch.testing.assert_close(traces[0], traces[1], rtol=0.02, atol=0)


@pytest.mark.usefixtures("_tiny_limits")
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
def test_a_limit_below_what_every_fit_takes_is_refused_at_once_and_says_what_would_do(sampling, monkeypatch):
    options = {"sampling": sampling, "rank": 6, "n_rows": 60}
    ways = r"complement='isotropic' or 'none', or fewer parameters\.$"
    with pytest.raises(ValueError, match=rf"111 parameters with complement='kron'.* memory=\d+, or {ways}") as error:
        fitted(memory=FEW // 2, **options)
    least = int(re.search(r"at least memory=(\d+)", str(error.value))[1])
    with pytest.raises(ValueError, match=f"at least memory={least}"):
        fitted(memory=least - 1, **options)
    with pytest.warns(UserWarning, match="longer than 1 keep their axes"):
        fitted(memory=least, solver="lanczos", **options)
    with pytest.raises(ValueError, match=r"hessian_structure='kron', which takes .* or fewer parameters\.$"):
        fitted(memory=FEW // 2, hessian_structure="kron", sampling=sampling)
    monkeypatch.setattr("debiased_laplace.debiasing.memory.free_memory", lambda _: 60_000)
    fitted(**options)
    with pytest.raises(ValueError, match=rf"which the directions are .* are free; expected a smaller rank, {ways}"):
        fitted(**{**options, "rank": 600})


@pytest.mark.usefixtures("_tiny_limits")
def test_fewer_rows_are_drawn_by_default():
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
    data = TensorDataset(torch.randn(200, 5), torch.arange(200) % 3)
    P, factors = sum(p.numel() for p in model.parameters()), (5 + 12) + 12 + (12 + 3) + 3
    n = 50
    # directions have no factors
    for options, size in (({"rank": 5}, factors), ({"rank": None}, P), ({"hessian_structure": "kron"}, factors)):
        options = {"complement": "none", **options} if "rank" in options else options
        probe = DebiasedLaplace(model, "classification", prior_precision=3.0, **options)
        cost = probe.cost(DataLoader(data, batch_size=50))
        needed = cost.n_bytes["eigenvectors"] + cost.n_bytes["vectors of P"]
        la = DebiasedLaplace(model, "classification", prior_precision=3.0, memory=needed + n * 4 * size, **options)
        la.fit(DataLoader(data, batch_size=50))
        assert n / 2 < la.rows.n < 1.5 * n


def test_a_limit_belongs_to_the_machine_and_not_to_the_state():
    la, X = fitted(rank=6, memory=LEAST)
    assert la.memory == LEAST
    other = DebiasedLaplace(la.model, "classification", prior_precision=3.0, rank=6, memory=2 * LEAST)
    other.load_state_dict(la.state_dict())
    torch.testing.assert_close(other(X), la(X))
    assert other.memory == 2 * LEAST
    assert other.fit_result.network.memory == 2 * LEAST


@pytest.mark.untyped
@pytest.mark.parametrize("memory", [0, LEAST - 1, 1e9, "1GB"])
def test_other_limits_are_refused(memory):
    with pytest.raises(ValueError, match=r"memory must be an integer of at least 536870912 \(bytes; 512 MiB\)"):
        fitted(memory=memory)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"complement": "diagonal", "solver": "lanczos"},
        {"complement": "isotropic", "magnitudes": "held_out"},
        {"complement": "none", "magnitudes": "same_batch"},
        {"subset_of_weights": "last_layer", "inverse_correction": "second_order", "complement": "diagonal"},
        {"backend": CurvlinopsHessian, "complement": "diagonal"},
    ],
    ids=str,
)
def test_directions_in_bfloat16_take_a_part_of_the_memory_and_round_what_is_predicted(sampling, options):
    options = {"rank": 4, "sampling": sampling, "n_rows": 60, "width": 100, **options}
    whole, X = fitted(**options)
    short, _ = fitted(directions_dtype="bfloat16", **options)
    held = short.fit_result.estimate.curvature.directions
    assert held.dtype == torch.bfloat16
    assert short.directions.dtype == torch.float64
    torch.testing.assert_close(short.directional_curvatures, whole.directional_curvatures, rtol=1e-2, atol=1e-6)
    (_, found), (_, expected) = (la._glm_predictive_distribution(X) for la in (short, whole))
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert 0 < difference < 1e-2


def test_a_state_keeps_the_format_of_the_directions():
    la, X = fitted(rank=4, directions_dtype="bfloat16")
    other = DebiasedLaplace(la.model, "classification", prior_precision=3.0, rank=4, sampling="uniform")
    other.load_state_dict(la.state_dict())
    assert other.fit_result.estimate.curvature.directions.dtype == torch.bfloat16
    torch.testing.assert_close(other(X), la(X))


@pytest.mark.parametrize("dtype", ["model", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"complement": "diagonal", "solver": "lanczos", "sampling": "uniform"},
        {"complement": "isotropic", "magnitudes": "held_out"},
        {"complement": "none", "magnitudes": "same_batch", "sampling": "uniform"},
        {"subset_of_weights": "last_layer", "inverse_correction": "second_order", "complement": "diagonal"},
        {"backend": CurvlinopsHessian, "complement": "diagonal", "sampling": "uniform"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The best prior precision|Even with|The data outweigh")
def test_directions_on_disk_give_the_same_posterior(dtype, options):
    options = {"rank": 4, "sampling": "curvature", "n_rows": 60, "directions_dtype": dtype, **options}
    here, X = fitted(**options)
    away, _ = fitted(directions_device="disk", **options)
    held = away.fit_result.estimate.curvature.directions
    assert is_on_disk(held)
    assert held.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float64)
    torch.testing.assert_close(held, here.fit_result.estimate.curvature.directions)
    for la in (here, away):
        la.prior_precision = 0.3
    P = here.n_params
    noise = torch.randn(5, P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (
        [la(X), p.log_det, p.root(noise), p.variances(noise), p @ noise.T]
        for la, p in ((la, la.posterior_precision) for la in (away, here))
    )
    torch.testing.assert_close(found, expected)
    # up to here without a copy of the whole, but for the closed forms of a last layer
    assert ("_spectrum" in vars(away.posterior_precision)) == ("subset_of_weights" in options)
    torch.testing.assert_close(away.posterior_variance, here.posterior_variance)
    losses = []
    for la in (away, here):
        quiet = {"method": "gridsearch", "progress_bar": False, "grid_size": 3}
        la.optimize_prior_precision(val_loader=[(X, X.new_zeros(len(X)).long())], **quiet)
        losses.append(la.prior_search.losses)
    torch.testing.assert_close(*losses)


@pytest.mark.filterwarnings("ignore:The best prior precision|Even with|The data outweigh")
@pytest.mark.parametrize("complement", ["isotropic", "diagonal"])
def test_priors_are_tuned_with_rounded_directions_as_they_predict(complement):
    la, X = fitted(rank=4, complement=complement, directions_dtype="bfloat16")
    y = X.new_zeros(len(X)).long()
    la.optimize_prior_precision(method="gridsearch", val_loader=[(X, y)], grid_size=3, progress_bar=False)
    expected = []
    for prior in la.prior_search.grid:
        la.prior_precision = float(prior)
        expected.append(-la(X)[:, 0].log().mean())
    torch.testing.assert_close(la.prior_search.losses, torch.stack(expected).double())


def test_where_directions_are_held_belongs_to_the_machine_and_not_to_the_state():
    la, X = fitted(rank=4, directions_device="disk")
    for device, on_disk in (("disk", True), ("cpu", False), ("model", False)):
        other = DebiasedLaplace(la.model, "classification", prior_precision=3.0, rank=4, directions_device=device)
        other.load_state_dict(la.state_dict())
        assert is_on_disk(other.fit_result.estimate.curvature.directions) == on_disk
        torch.testing.assert_close(other(X), la(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hessian_structure": "kron"}, "requires hessian_structure='lowrank'"),
        ({"metric": "kron"}, "requires metric='euclidean'"),
        ({"directions_dtype": "float16"}, "directions_dtype must be one of"),
        ({"directions_device": "cuda"}, "directions_device must be one of"),
        ({"directions_device": "disk", "metric": "kron"}, "directions_device='disk' requires metric='euclidean'"),
    ],
)
def test_where_the_format_of_directions_has_no_effect_it_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fitted(**({} if "directions_device" in options else {"directions_dtype": "bfloat16"}) | options)


def test_where_the_data_outweigh_the_prior_rounded_directions_are_warned_of():
    options = {"rank": 4, "directions_dtype": "bfloat16", "complement": "none"}
    la, _ = fitted(**options)
    whole, _ = fitted(**{**options, "directions_dtype": "model"})
    stiffest = float(la.directional_curvatures.max()) * 40
    for ratio, wide in ((1e3, False), (1e6, True)):
        la.prior_precision = whole.prior_precision = stiffest / ratio
        if wide:
            with pytest.warns(UserWarning, match=r"about \d+% too large. Expected directions_dtype='model'"):
                variance = la.posterior_precision.variances(whole.directions.T)
        else:
            variance = la.posterior_precision.variances(whole.directions.T)
        expected = whole.posterior_precision.variances(whole.directions.T)
        assert (float((variance / expected)[0]) > 1.1) == wide


class Unused(nn.Module):
    """A recurrent layer on packed sequences, which vmap refuses, and a large parameter that no output depends on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.randn(30, 40))
        self.embedding, self.recurrent = nn.Embedding(20, 16), nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(x), lengths, batch_first=True)
        return self.out(self.recurrent(packed)[1][-1])


@pytest.mark.usefixtures("_tiny_limits")
def test_parameters_that_no_output_depends_on_may_be_a_group_of_their_own(monkeypatch):
    torch.manual_seed(0)
    model, X = Unused().double().eval(), torch.randint(0, 20, (40, 6))
    loader = DataLoader(TensorDataset(X, torch.arange(40) % 3), batch_size=16)
    options = {"sampling": "uniform", "rank": 10, "complement": "diagonal", "solver": "gram", "prior_precision": 3.0}
    plenty = DebiasedLaplace(model, "classification", **options)
    plenty.fit(loader)
    taken = sum(bytes_beyond_rows(plenty.fit_result.network, plenty.fit_result.options).values())
    little = DebiasedLaplace(model, "classification", memory=taken + 1250 * 8 * 160, **options)
    groups = []
    compute = RowCurvature._rows_of
    monkeypatch.setattr(RowCurvature, "_rows_of", lambda self, chosen: groups.append(chosen) or compute(self, chosen))
    little.fit(loader)
    assert range(1) in groups
    torch.testing.assert_close(little(X), plenty(X), rtol=1e-6, atol=1e-9)
