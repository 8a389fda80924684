"""`debiased-laplace fit` writes a state that `DebiasedLaplace` loads."""

import argparse
import re
import subprocess
import sys
from inspect import signature
from typing import Literal, get_args, get_origin

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace
from debiased_laplace.cli import main, model_commands
from debiased_laplace.cli.arguments import trained_model

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loader():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 4, generator=generator)
    return DataLoader(TensorDataset(X, torch.randint(3, (40,), generator=generator)), batch_size=10)


def pairs():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 4, generator=generator)
    return DataLoader(TensorDataset(X, torch.randn(40, 3, generator=generator)), batch_size=10)


def validation():
    generator = torch.Generator().manual_seed(8)
    X = torch.randn(60, 4, generator=generator)
    return DataLoader(TensorDataset(X, torch.randint(3, (60,), generator=generator)), batch_size=25)


def no_validation():
    return []


def nothing():
    return None


class Late:
    # imports another module of the working directory when samples are loaded, as workers do
    def __init__(self):
        self.samples = loader().dataset

    def __len__(self):
        return 40

    def __getitem__(self, i):
        import transforms_of_the_user

        return transforms_of_the_user.unchanged(*self.samples[i])


def late():
    return DataLoader(Late(), batch_size=10)


def spawning():
    return DataLoader(Late(), batch_size=10, num_workers=1, multiprocessing_context="spawn")


class Broken(Late):
    def __getitem__(self, i):
        raise KeyError("a column")


def breaking():
    return DataLoader(Broken(), batch_size=10)


class Leaving(Late):
    def __getitem__(self, i):
        raise SystemExit(1)


def leaving():
    return DataLoader(Leaving(), batch_size=10)


def left():
    raise SystemExit(1)


def broken():
    raise RuntimeError("no data today")


number = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "problem_of_the_user.py").write_text(MODULE)
    (tmp_path / "transforms_of_the_user.py").write_text("def unchanged(*sample):\n    return sample\n")
    (tmp_path / "unfinished_by_the_user.py").write_text("def model(:\n    pass\n")
    (tmp_path / "broken_by_the_user.py").write_text("\nraise KeyError('a setting')\n")
    (tmp_path / "left_by_the_user.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.chdir(tmp_path)
    model = make_model()
    torch.save(model.state_dict(), "weights.pt")
    torch.save(torch.arange(2, 30, 3), "indices.pt")
    yield tmp_path
    for name in ("problem_of_the_user", "transforms_of_the_user"):
        sys.modules.pop(name, None)


def make_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for p in model.parameters():
            nn.init.normal_(p)
    return model


def make_loader(likelihood):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 4, generator=generator)
    if likelihood == "regression":
        y = torch.randn(40, 3, generator=generator)
    else:
        y = torch.randint(3, (40,), generator=generator)
    return DataLoader(TensorDataset(X, y), batch_size=10)


def arguments(likelihood="classification", loader=None, **options):
    loader = loader or ("problem_of_the_user:loader" if likelihood == "classification" else "problem_of_the_user:pairs")
    given = {
        "model": "problem_of_the_user:model",
        "weights": "weights.pt",
        "loader": loader,
        "likelihood": likelihood,
        "out": "posterior.pt",
        "device": "cpu",
        **options,
    }
    flat = ["fit", "--no-progress"]
    for name, value in given.items():
        flat.append(f"--{name.replace('_', '-')}")
        flat += [] if value is True else [str(value)]
    return flat


def test_a_dry_run_prints_the_cost_and_writes_nothing(folder, capsys):
    assert main(arguments(dry_run=True, n_rows=20, rank=4, memory=2**30)) == 0
    shown = capsys.readouterr().out
    assert "43 parameters takes 40 forward and about 20 backward passes" in shown
    assert "GiB beyond the model" in shown
    assert not (folder / "posterior.pt").exists()


CASES = {
    "low rank": {"rank": 4, "complement": "diagonal", "magnitude_samples": 15, "sampling": "uniform"},
    "low rank by Lanczos on the same batch": {"rank": 3, "solver": "lanczos", "magnitudes": "same_batch"},
    "Kronecker": {"hessian_structure": "kron", "magnitudes": "held_out", "direction_samples": 0.4},
    "Kronecker by K-FAC": {"hessian_structure": "kron", "kron_basis": "kfac", "kfac_approx": "reduce"},
    "Kronecker with its own magnitudes": {
        "hessian_structure": "kron",
        "kron_magnitudes": "kronecker",
        "sampling": "uniform",
    },
    "full": {"hessian_structure": "full", "seed": 3},
    "last layer, low rank": {"subset_of_weights": "last_layer"},
    "last layer by name, Kronecker": {
        "subset_of_weights": "last_layer",
        "hessian_structure": "kron",
        "last_layer_name": "2",
    },
    "last layer, full": {"subset_of_weights": "last_layer", "hessian_structure": "full"},
    "subnetwork, low rank": {"subset_of_weights": "subnetwork", "subnetwork_indices": "indices.pt"},
    "subnetwork, Kronecker": {
        "subset_of_weights": "subnetwork",
        "hessian_structure": "kron",
        "subnetwork_indices": "indices.pt",
    },
    "subnetwork, full": {
        "subset_of_weights": "subnetwork",
        "hessian_structure": "full",
        "subnetwork_indices": "indices.pt",
    },
    "empirical Fisher": {"backend": "CurvlinopsEF"},
    "Hessian": {"backend": "CurvlinopsHessian", "hessian_structure": "full"},
    "Monte Carlo": {"backend": "AsdlGGN", "stochastic": True, "num_samples": 3},
    "held out, without complement": {"magnitudes": "held_out", "complement": "none", "prior_mean": 0.2},
    "cross-fitted in five folds, in the Kronecker metric": {
        "magnitudes": "cross_fitted",
        "n_folds": 5,
        "complement": "kron",
        "metric": "kron",
        "sampling": "uniform",
        "rank": 4,
    },
    "with the bias of the inverse corrected": {"inverse_correction": "second_order"},
    "automatic choices": {
        "sampling": "uniform",
        **dict.fromkeys(("rank", "magnitudes", "complement", "metric", "direction_samples"), "auto"),
    },
}


def constructor_arguments(options):
    from laplace import curvature

    options = dict(options)
    if "backend" in options:
        options["backend"] = getattr(curvature, options["backend"])
    kwargs = {key: options.pop(key) for key in ("stochastic", "num_samples") if key in options}
    if kwargs:
        options["backend_kwargs"] = kwargs
    if "subnetwork_indices" in options:
        options["subnetwork_indices"] = torch.load(options["subnetwork_indices"], weights_only=True)
    return options


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("case", CASES)
def test_the_state_is_that_of_the_same_fit_in_python(case, likelihood, folder, capsys):
    hyper = {"prior_precision": 0.4, "temperature": 1.3}
    if likelihood == "regression":
        hyper["sigma_noise"] = 0.7
    assert main(arguments(likelihood, **CASES[case], **hyper, n_data=90)) == 0
    printed = capsys.readouterr().out
    assert "load_state_dict" in printed
    model, options = make_model(), constructor_arguments(CASES[case])
    expected = DebiasedLaplace(model, likelihood, **options, **hyper)
    expected.fit(make_loader(likelihood), n_data=90)
    loaded = DebiasedLaplace(model, likelihood, **options)
    loaded.load_state_dict(torch.load("posterior.pt", weights_only=True))
    assert repr(loaded) == repr(expected)
    assert repr(loaded) in printed
    assert (str(expected.choice) in printed) == (expected.choice is not None)
    assert loaded.n_data == 90
    x = make_loader(likelihood).dataset.tensors[0][:6]
    actual, wanted = (la(x) if likelihood == "regression" else (la(x),) for la in (loaded, expected))
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_prior_is_tuned_on_request(folder):
    assert main(arguments(hessian_structure="kron", tune_prior=True, prior_precision=0.4)) == 0
    la = DebiasedLaplace(make_model(), "classification", "all", "kron", prior_precision=0.4)
    la.fit(make_loader("classification"))
    la.optimize_prior_precision(method="marglik")
    state = torch.load("posterior.pt", weights_only=True)
    torch.testing.assert_close(state["prior_precision"], la.prior_precision, rtol=1e-3, atol=0.0)
    assert abs(float(state["prior_precision"]) - 0.4) > 0.1


def test_a_prior_for_every_parameter_is_tuned_on_request(folder, capsys):
    assert main(arguments(tune_prior=True, prior_structure="diag")) == 0
    la = DebiasedLaplace(make_model(), "classification")
    la.fit(make_loader("classification"))
    la.optimize_prior_precision(prior_structure="diag")
    state = torch.load("posterior.pt", weights_only=True)
    torch.testing.assert_close(state["prior_precision"], la.prior_precision, rtol=1e-3, atol=0.0)
    assert len(la.prior_precision) == la.n_params
    assert "complement='diagonal', a prior precision per parameter" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The best prior precision", "ignore:Even the best")
def test_the_prior_is_tuned_on_validation_data(folder, capsys):
    options = {"hessian_structure": "kron", "prior_precision": 0.4}
    assert main(arguments(**options, tune_prior=True, validation_loader="problem_of_the_user:validation")) == 0
    la = DebiasedLaplace(make_model(), "classification", **options)
    la.fit(make_loader("classification"))
    generator = torch.Generator().manual_seed(8)
    X = torch.randn(60, 4, generator=generator)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=[(X, torch.randint(3, (60,), generator=generator))], progress_bar=False
    )
    state = torch.load("posterior.pt", weights_only=True)
    torch.testing.assert_close(state["prior_precision"], la.prior_precision)
    assert f"prior precision {la.prior_search.chosen:.4g}, the best of 100" in capsys.readouterr().out


def test_an_interrupted_fit_goes_on(folder, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("debiased_laplace.posterior.drawn_fit.deal_rows", interrupted)
        assert main(arguments(checkpoint_dir="kept")) != 0
    kept = folder / "kept" / "debiased_laplace_fit"
    assert len(list(kept.iterdir())) >= 4
    assert main(arguments(checkpoint_dir="kept")) == 0
    assert not kept.exists()


def test_no_more_samples_are_read_than_the_tolerance_requires(folder, capsys):
    assert main(arguments(tolerance=1e9, prior_precision=0.4, sampling="uniform")) == 0
    la = DebiasedLaplace(make_model(), "classification", prior_precision=0.4, sampling="uniform")
    la.fit(make_loader("classification"), tolerance=1e9)
    printed = capsys.readouterr().out
    assert repr(la) in printed
    assert str(la.stopping) in printed
    assert [stage.n_samples for stage in la.stopping.stages] == [32, 40]


def parser_and_command():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    model_commands.add_to(commands)
    return parser, commands.choices["fit"]


def parsed(**options):
    return parser_and_command()[0].parse_args(arguments(**options))


def keywords():
    return {p.name: p for p in signature(DebiasedLaplace).parameters.values() if p.name not in ("model", "likelihood")}


def test_every_argument_of_the_constructor_is_an_option_and_keeps_its_default():
    assert model_commands._options(parsed()) == {}
    converted = {"subnetwork_indices", "backend", "backend_kwargs"}
    # of predictions, without effect, or of scripts of several processes
    unused = {"enable_backprop", "feature_reduction", "process_group", "shard_directions"}
    assert set(model_commands._LAPLACE_ARGUMENTS) | converted == set(keywords()) - unused


def test_options_have_the_choices_of_the_constructor():
    choices = {action.dest: action.choices for action in parser_and_command()[1]._actions if action.choices}
    # an optional one is a literal too
    annotations = {name: p.annotation for name, p in keywords().items()}
    annotations["complement"] = get_args(annotations["complement"])[0]
    literals = {name: get_args(a) for name, a in annotations.items() if get_origin(a) is Literal}
    assert len(literals) == 11
    for name, values in literals.items():
        assert set(choices[name]) == set(values), name
    for name in ("rank", "direction_samples"):
        assert getattr(parsed(**{name: "auto"}), name) == "auto"


def test_words_in_place_of_numbers_are_refused(folder, capsys):
    for name in ("rank", "direction_samples", "n_folds"):
        with pytest.raises(SystemExit) as exit_:
            main(arguments(**{name: "some"}))
        assert exit_.value.code == 2
        assert "invalid" in capsys.readouterr().err


WRONG = {
    "no such module": ({"model": "nowhere_to_be_found:model"}, "--model 'nowhere_to_be_found:model' cannot be found"),
    "no such callable": ({"model": "problem_of_the_user:mdel"}, "cannot be found: .*mdel"),
    "a module with a syntax error": (
        {"model": "unfinished_by_the_user:model"},
        r"cannot be imported: SyntaxError: .*unfinished_by_the_user.py, line 1",
    ),
    "a module that fails": (
        {"model": "broken_by_the_user:model"},
        r"cannot be imported: KeyError: 'a setting' \(broken_by_the_user.py, line 2\)",
    ),
    "a module that exits": ({"loader": "left_by_the_user:loader"}, "cannot be imported: SystemExit: 1"),
    "a callable that exits": ({"loader": "problem_of_the_user:left"}, "failed: SystemExit: 1"),
    "a relative module": ({"loader": ".problem_of_the_user:left"}, "cannot be imported: TypeError"),
    "a callable that returns nothing": ({"loader": "problem_of_the_user:nothing"}, "got NoneType"),
    "a validation loader that returns nothing": (
        {"tune_prior": True, "validation_loader": "problem_of_the_user:nothing"},
        "--validation-loader 'problem_of_the_user:nothing' must return a DataLoader; got NoneType",
    ),
    "an n_data of 400 digits": ({"n_data": 10**399}, "too large"),
    "the weights themselves": ({"weights": "weights.pt", "out": "./weights.pt"}, "is the file of --weights"),
    "no such folder": ({"out": "nowhere/posterior.pt"}, "--out nowhere/posterior.pt cannot be .*no folder nowhere"),
    "no colon": ({"loader": "problem_of_the_user"}, "--loader must be given as module:callable"),
    "not callable": ({"loader": "problem_of_the_user:number"}, "number' is a int"),
    "a callable that fails": ({"loader": "problem_of_the_user:broken"}, "failed: RuntimeError: no data today"),
    "not a module": ({"model": "problem_of_the_user:loader"}, "must return a torch.nn.Module; got DataLoader"),
    "no such weights": ({"weights": "nothing.pt"}, "--weights nothing.pt is not a file"),
    "weights of another model": ({"weights": "indices.pt"}, "does not fit the model"),
    "weights that are not tensors": ({"weights": "problem_of_the_user.py"}, "cannot be loaded with weights_only=True"),
    "a share of two": ({"direction_samples": 2.0}, "direction_samples"),
    "an option of another structure": ({"hessian_structure": "full", "rank": 3}, "rank requires hessian_structure"),
    "a Kronecker metric without its complement": ({"metric": "kron", "complement": "none"}, "complement='kron'"),
    "one fold": ({"n_folds": 1}, "n_folds must be an integer of at least 2; got 1"),
    "no tolerance": ({"tolerance": 0.0}, "tolerance"),
    "n_data too small": ({"n_data": 3}, "expected at least 40, got 3"),
    "validation data without tuning": (
        {"validation_loader": "problem_of_the_user:validation"},
        "--validation-loader requires --tune-prior",
    ),
    "validation data without samples": (
        {"tune_prior": True, "validation_loader": "problem_of_the_user:no_validation"},
        "val_loader yields no batches",
    ),
    "a structure of a prior that is not tuned": (
        {"prior_structure": "diag"},
        "--prior-structure diag requires --tune-prior",
    ),
    "num_samples alone": ({"num_samples": 3}, "stochastic=True"),
    "a folder in the way": ({"out": "."}, "--out must be a file"),
}


@pytest.mark.untyped
@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_exit_code_2(case, folder, capsys):
    options, expected = WRONG[case]
    assert main(arguments(**options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("debiased-laplace: ")
    assert re.search(expected, error), error
    assert not (folder / "posterior.pt").exists()


@pytest.mark.slow
def test_a_pickle_that_would_run_code_is_not_run(folder):
    (folder / "evil.py").write_text(
        "import os\nclass Evil:\n    def __reduce__(self):\n        return os.mkdir, ('ran',)\n"
    )
    script = "import torch, evil; torch.save(evil.Evil(), 'weights.pt')"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder)
    assert main(arguments()) == 2
    assert not (folder / "ran").exists()


CHECKPOINTS = {
    "of DataParallel": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "of a compiled model in DataParallel": lambda w: {f"module._orig_mod.{name}": value for name, value in w.items()},
    "with the optimizer": lambda weights: {"state_dict": weights, "optimizer": {"lr": 0.1}, "epoch": 3},
    "of a training framework": lambda w: {"epoch": 3, "state_dict": {f"model.{name}": v for name, v in w.items()}},
    "under another key": lambda weights: {"model_state_dict": weights, "loss": 0.3},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_weights_are_found_in_checkpoints(case, folder):
    expected = make_model().state_dict()
    torch.save(CHECKPOINTS[case](expected), "weights.pt")
    model = trained_model(parsed())
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"net": make_model().state_dict(), "epoch": 3}, "expected a state dict, .*; got a mapping of 'net', 'epoch'"),
        ([torch.ones(3)], "expected a state dict, .*; got list"),
        ({"module.0.weight": torch.ones(5, 4)}, "Missing key"),
    ],
)
def test_checkpoints_without_the_weights_are_refused(saved, message, folder, capsys):
    torch.save(saved, "weights.pt")
    assert main(arguments()) == 2
    assert re.search(f"(?s)--weights weights.pt does not fit the model: .*{message}", capsys.readouterr().err)


def test_modules_of_the_user_are_found_as_long_as_samples_are_loaded(folder):
    before = list(sys.path)
    assert main(arguments(loader="problem_of_the_user:late", hessian_structure="kron")) == 0
    assert (folder / "posterior.pt").exists()
    assert sys.path == before


@pytest.mark.parametrize("loader", ["breaking", "leaving"])
def test_a_failing_data_set_is_no_failed_threshold(loader, folder, capsys):
    assert main(arguments(loader=f"problem_of_the_user:{loader}")) == 2
    assert re.search("KeyError: 'a column'|SystemExit: 1", capsys.readouterr().err)


def without_space(state, path):
    file = path if hasattr(path, "write") else open(path, "wb")  # noqa: SIM115
    file.write(b"half of a st")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 24")


def test_a_full_disk_keeps_the_earlier_state(folder, monkeypatch, capsys):
    assert main(arguments(hessian_structure="kron")) == 0
    before = (folder / "posterior.pt").read_bytes()
    names = {path.name for path in folder.iterdir()}
    monkeypatch.setattr(torch, "save", without_space)
    assert main(arguments(hessian_structure="kron", prior_precision=0.4)) == 2
    assert "--out posterior.pt cannot be written" in capsys.readouterr().err
    assert (folder / "posterior.pt").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.slow
def test_spawned_workers_find_the_module_of_the_loader(folder, tmp_path_factory):
    # the script lies elsewhere, as that of an installed package does
    script = tmp_path_factory.mktemp("bin") / "debiased-laplace"
    script.write_text("from debiased_laplace.cli import main\nif __name__ == '__main__':\n    exit(main())\n")
    command = [sys.executable, str(script), *arguments(loader="problem_of_the_user:spawning", rank=3)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "posterior.pt").exists()


@pytest.mark.slow
def test_as_a_process_with_progress(folder):
    command = [a for a in arguments(hessian_structure="kron") if a != "--no-progress"]
    done = subprocess.run(
        [sys.executable, "-m", "debiased_laplace.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "posterior.pt").exists()
    assert "[Scoring rows]" in done.stderr
    assert "Warning" not in done.stderr
    assert "DebiasedKronLaplace" in done.stdout
