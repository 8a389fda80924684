"""One pass over the loader: every method sees the same inputs and draws the same numbers."""

import weakref

import pytest
import torch
from models import mlp, targets
from torch.utils.data import DataLoader, Dataset, TensorDataset

from debiased_laplace import DebiasedLaplace, evaluate
from debiased_laplace.calibration.predicting.collecting import collect
from debiased_laplace.calibration.predicting.methods import choose_prediction, make_predictor
from debiased_laplace.data.inputs import MappingKeys

N, C = 40, 3


class Augmenting(Dataset):
    """Adds noise from the global generator to every image, and counts what was loaded."""

    def __init__(self):
        self.X, self.y = mlp()[1], targets("classification")
        self.loaded = 0

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.loaded += 1
        return self.X[i] + torch.randn(4, dtype=torch.float64), self.y[i]


class Recorder:
    """A method that notes its inputs, spoils them, and draws from the global generator."""

    def __init__(self, n_draws):
        self.seen, self.n_draws = [], n_draws

    def __call__(self, x):
        self.seen.append(x.clone())
        x.zero_()
        torch.rand(self.n_draws)
        return torch.full((len(x), C), 1 / C)

    @property
    def inputs(self):
        return torch.cat(self.seen)


def test_every_method_gets_the_same_augmented_inputs_once():
    data, methods = Augmenting(), {f"m{i}": Recorder(i) for i in range(3)}
    evaluate(methods, DataLoader(data, batch_size=7, shuffle=True), task="multiclass")
    assert data.loaded == N
    for recorder in methods.values():
        assert torch.equal(recorder.inputs, methods["m0"].inputs)
    # they were augmented at all
    assert not torch.isin(methods["m0"].inputs, data.X).any()


def test_what_one_method_draws_changes_no_input():
    recorded = []
    for n_draws in (0, 50):
        recorder = Recorder(n_draws)
        evaluate({"m": recorder}, DataLoader(Augmenting(), batch_size=7, shuffle=True), task="multiclass", seed=5)
        recorded.append(recorder.inputs)
    assert torch.equal(*recorded)


def test_the_seed_moves_the_augmentation():
    recorded = []
    for seed in (1, 2):
        recorder = Recorder(0)
        evaluate({"m": recorder}, DataLoader(Augmenting(), batch_size=7), task="multiclass", seed=seed)
        recorded.append(recorder.inputs)
    assert not torch.equal(*recorded)


def posterior():
    model, X = mlp()
    la = DebiasedLaplace(model, "classification", prior_precision=0.4)
    la.fit(DataLoader(TensorDataset(X, targets("classification")), batch_size=8))
    return la


def dropout(x):
    """Draws from the global generator, as users' Monte-Carlo dropout does."""
    weights = torch.nn.functional.dropout(torch.ones(20, 1, C, dtype=x.dtype), 0.4)
    return (x[:, :C] * weights).softmax(-1)


@pytest.mark.parametrize("options", [{"link_approx": "mc"}, {"pred_type": "nn"}, {}], ids=["glm", "nn", "probit"])
def test_a_method_twice_says_the_same_twice(options):
    la = posterior()
    loader = DataLoader(Augmenting(), batch_size=7, shuffle=True)
    methods = {"one": la, "two": la, "dropout": dropout, "dropout again": dropout}
    report = evaluate(methods, loader, task="multiclass", **options)
    assert report.methods["one"] == report.methods["two"]
    assert report.methods["dropout"] == report.methods["dropout again"]


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_draws_do_not_depend_on_the_size_of_the_batches(pred_type):
    la, data = posterior(), TensorDataset(mlp()[1], targets("classification"))
    options = choose_prediction("multiclass", pred_type, "mc", 12, seed=3)
    predictors = {"la": make_predictor("la", la, options)}
    found = [
        collect(predictors, DataLoader(data, batch_size=size), MappingKeys(), seed=3, progress_bar=False).pieces["la"]
        for size in (5, N)
    ]
    for name in ("probabilities", "mutual_information"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)
    assert found[0]["mutual_information"].min() > 0


def test_samples_of_one_batch_at_a_time_and_nothing_but_means_afterwards():
    alive, most = [], []

    def method(x):
        most.append(sum(ref() is not None for ref in alive))
        samples = torch.rand(50, len(x), C, dtype=torch.float64)
        samples /= samples.sum(-1, keepdim=True)
        alive.append(weakref.ref(samples))
        return samples

    options = choose_prediction("multiclass", "glm", None, 100, seed=0)
    loader = DataLoader(Augmenting(), batch_size=4)
    found = collect({"m": make_predictor("m", method, options)}, loader, MappingKeys(), seed=0, progress_bar=False)
    assert max(most) == 0
    assert all(ref() is None for ref in alive)
    assert sum(t.numel() for t in found.pieces["m"].values()) <= N * C + N + len(loader)


def test_predictions_are_kept_on_the_cpu_in_their_own_dtype_without_the_loaders_memory():
    X, y = mlp()[1].float(), targets("classification")
    options = choose_prediction("multiclass", "glm", None, 100, seed=0)
    predictors = {"m": make_predictor("m", lambda x: x[:, :C].softmax(-1), options)}
    found = collect(predictors, [(X[:10], y[:10]), (X[10:], y[10:])], MappingKeys(), seed=0, progress_bar=False)
    assert found.pieces["m"]["probabilities"].dtype == torch.float32
    torch.testing.assert_close(found.pieces["m"]["probabilities"], X[:, :C].softmax(-1))
    assert torch.equal(found.targets, y)
    assert found.targets.data_ptr() != y.data_ptr()
    assert found.seconds["m"] > 0


def test_a_report_of_the_same_input_and_seed_is_the_same_but_for_the_times():
    la, loader = posterior(), DataLoader(Augmenting(), batch_size=7, shuffle=True)
    reports = [evaluate({"la": la}, loader, task="multiclass", pred_type="nn", seed=2) for _ in range(2)]
    assert reports[0].methods == reports[1].methods
    assert reports[0].posteriors == reports[1].posteriors
    assert reports[0].data == reports[1].data
