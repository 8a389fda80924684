"""Wrong arguments of every public entry point, tried without the tests' type checks. Prints one JSON object."""

import json
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from models import mlp, targets  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from debiased_laplace import (  # noqa: E402
    DebiasedLaplace,
    DebiasedNewton,
    Regularizer,
    calibration_report,
    conjugate_gradients,
    diagnose,
    directional_derivatives,
    evaluate,
    held_out_kl,
    newton_step,
    quadratic_along,
)
from debiased_laplace.calibration import Gaussian, ReportFigure, ReportTable, Samples  # noqa: E402

NAN, INF, OBJECT = math.nan, math.inf, object()
TWO = torch.tensor([0.3, 0.7])
COUNT = ["3", 2.5, True, None, -1, NAN, TWO, OBJECT, [3], 1j]
POSITIVE = ["0.3", None, -0.3, NAN, INF, TWO, OBJECT, [0.3, 0.7], 1j, {}]
SHARE = ["0.3", None, -0.3, 1.7, NAN, TWO, OBJECT, [0.3], 1j]
CHOICE = ["unknown", 3, None, OBJECT, ["glm"], TWO, np.array(["a", "b"]), NAN]
FLAG = ["yes", 2, None, OBJECT, [True], TWO, NAN]
NAME = [3, OBJECT, ["a"], TWO, b"a"]
LOADER = [3, None, "x", OBJECT, TWO, [], [("a", "b")], [(TWO,)], [3], {"a": 1}]
INPUTS = [None, 3, "x", [[0.1]], OBJECT, torch.zeros(5, 3), torch.zeros(0, 4), torch.tensor(0.3), {}, {"a": 3},
          torch.full((3, 4), NAN), torch.zeros(3, 4, dtype=torch.complex64), np.zeros((3, 4))]  # fmt: skip
MODEL = [None, 3, "net", OBJECT, torch.nn.Linear, torch.nn.Identity(), torch.nn.Linear(9, 2)]
LIKELIHOOD = ["unknown", 3, None, OBJECT, ["classification"]]
MAPPING = [3, "x", OBJECT, [1], TWO]
GENERATOR = [3, "seed", OBJECT, np.random.default_rng(1)]


def without(values, *kept):
    """The values but those that are allowed here."""
    return [v for v in values if not any(v is k or (type(v) is type(k) and v == k) for k in kept)]


X, Y, R = mlp()[1], targets("classification"), targets("regression")
N = len(X)


def loader(y=Y, batch_size=16):
    return DataLoader(TensorDataset(X, y), batch_size=batch_size)


def posterior(likelihood="classification", **options):
    return DebiasedLaplace(mlp()[0], likelihood, rank=3, prior_precision=0.4, **options)


def fitted(likelihood="classification", **options):
    la = posterior(likelihood, **options)
    la.fit(loader(Y if likelihood == "classification" else R))
    return la


LA, LAR = fitted(), fitted("regression", sigma_noise=0.7)
LAH = posterior(magnitudes="held_out", direction_samples=10, magnitude_samples=10, sampling="uniform")
LAH.fit(DataLoader(TensorDataset(X[:20], Y[:20]), batch_size=10), n_data=N)
REST = DataLoader(TensorDataset(X[20:], Y[20:]), batch_size=10)
P = torch.distributions.Dirichlet(torch.ones(60, 3, dtype=torch.float64)).sample()
T = torch.arange(60) % 3
S = torch.stack([P, P.roll(1, 0)])
MU, SD = torch.randn(60), torch.rand(60) + 0.2
V = torch.eye(93, 2, dtype=torch.float64)
REPORT = calibration_report({"a": P, "b": P.flip(0)}, T, task="multiclass", n_resamples=5)
SMALL = {"n_resamples": 5}
FOLDER = tempfile.gettempdir()  # nothing is written there


def report(predictions=None, targets=T, **options):
    options = {"task": "multiclass", **SMALL, **options}
    return calibration_report({"a": P, "b": S} if predictions is None else predictions, targets, **options)


def regression(predictions=None, targets=MU, **options):
    return report({"a": (MU, SD)} if predictions is None else predictions, targets, task="regression", **options)


def evaluated(posteriors=LA, test=None, **options):
    test = loader() if test is None else test
    return evaluate(posteriors, test, **{"task": "multiclass", "n_samples": 4, **SMALL, **options})


def optimizer(**options):
    model = mlp()[0]
    arguments = {"params": model.parameters(), "model": model, "likelihood": "classification", **options}
    return DebiasedNewton(arguments.pop("params"), arguments.pop("model"), arguments.pop("likelihood"), **arguments)


def fresh_fit(data=None, **options):
    posterior().fit(loader() if data is None else data, **options)


def tuned(**options):
    fitted().optimize_prior_precision(**{"n_steps": 3, "grid_size": 3, "val_loader": loader(), **options})


def stepped(**options):
    arguments = {"model": mlp()[0], "likelihood": "classification", "batch": (X, Y), "max_iterations": 3, **options}
    return newton_step(arguments.pop("model"), arguments.pop("likelihood"), arguments.pop("batch"), **arguments)


def diagnosed(**options):
    arguments = {"model": mlp()[0], "likelihood": "classification", "loader": loader(), **options}
    few = {"batch_sizes": [8], "n_draws": 1, "n_reference": 8, "prior_precision": None}
    return diagnose(*[arguments.pop(k) for k in ("model", "likelihood", "loader")], **{**few, **arguments})


def along(function=directional_derivatives, **options):
    arguments = {"model": mlp()[0], "likelihood": "classification", "data": loader(), "directions": V, **options}
    return function(*[arguments.pop(k) for k in ("model", "likelihood", "data", "directions")], **arguments)


def solved(**options):
    arguments = {"matvec": lambda v: 2 * v, "b": TWO, "max_iterations": 3, "tolerance": 1e-3, **options}
    return conjugate_gradients(arguments.pop("matvec"), arguments.pop("b"), **arguments)


def made(**options):
    arguments = {"model": mlp()[0], "likelihood": "classification", "rank": 3, **options}
    return DebiasedLaplace(arguments.pop("model"), arguments.pop("likelihood"), **arguments)


def closure_step(closure):
    return optimizer().step(closure)


def keyword(function, name):
    return lambda value: function(**{name: value})


def keywords(function, values):
    """Cases of one function: a mapping of arguments to their wrong values."""
    return {name: (keyword(function, name), wrong) for name, wrong in values.items()}


PROBABILITIES = [None, 3, "x", OBJECT, [], {}, -P, P * 1.2, P * NAN, P[:, :1], P[:5], P[None, None, None], P * 1j,
                 [["a", "b"]]]  # fmt: skip
TARGETS = [None, 3, "x", OBJECT, [], {}, T + 9, T - 1, T * 0.5, T[:5], ["a"] * 60, T * NAN, T * 1j]
REPORT_OPTIONS = {
    "baseline": without(CHOICE, None),
    "n_bins": COUNT, "confidence_level": SHARE, "n_resamples": COUNT, "seed": COUNT,
    "class_names": [3, "abc", OBJECT, ["a"], {"a": 1}], "title": NAME, "description": NAME, "metadata": MAPPING,
    "tables": [3, "x", OBJECT, [3], TWO], "figures": [3, "x", OBJECT, [3], TWO],
    "temperature_scaling": CHOICE, "clusters": [3, "x", OBJECT, [1, 2], {}, TWO],
    "max_samples": COUNT, "thresholds": [3, "nowhere.toml", OBJECT, {"a": 1}, [3], []],
}  # fmt: skip
EVALUATE_OPTIONS = REPORT_OPTIONS | {
    "posteriors": [None, 3, "x", OBJECT, {}, {"a": 3}, {3: LA}, [LA], posterior(), {"a": lambda x: None},
                   {"a": lambda x: "p"}, {"a": lambda x: x}],
    "test": without(LOADER, None), "include_map": ["yes", 2, OBJECT, TWO], "pred_type": CHOICE,
    "link_approx": without(CHOICE, None), "n_samples": COUNT, "ood_loaders": [*MAPPING, {3: loader()}, {"a": 3}],
    "validation_loader": without(LOADER, None), "held_out_loader": [3, "x", OBJECT, TWO, {"a": 1}],
    "fitted_loader": [3, "x", OBJECT], "dict_key_x": NAME, "dict_key_y": NAME, "progress_bar": FLAG,
    "task": without(CHOICE, None),
}  # fmt: skip
PRIOR = without(POSITIVE, [0.3, 0.7])
CASES = {
    "DebiasedLaplace": keywords(made, {
        "model": MODEL[:5], "likelihood": LIKELIHOOD, "subset_of_weights": CHOICE, "hessian_structure": CHOICE,
        "rank": without(COUNT, None), "magnitudes": CHOICE, "n_folds": COUNT, "complement": without(CHOICE, None),
        "sampling": CHOICE, "n_rows": without(COUNT, None), "memory": without(COUNT, None), "directions_dtype": CHOICE,
        "directions_device": CHOICE, "shard_directions": FLAG, "metric": CHOICE, "inverse_correction": CHOICE,
        "solver": CHOICE, "seed": without(COUNT, -1),
        "direction_samples": SHARE, "magnitude_samples": without(SHARE, None), "kron_basis": CHOICE,
        "kron_magnitudes": CHOICE, "kfac_approx": CHOICE, "sigma_noise": without(POSITIVE, None),
        "prior_precision": PRIOR,
        "prior_mean": ["0.3", None, NAN, INF, TWO, OBJECT, 1j, {}], "temperature": POSITIVE, "enable_backprop": FLAG,
        "dict_key_x": [*NAME, None], "dict_key_y": [*NAME, None], "backend": [3, "GGN", OBJECT, object],
        "backend_kwargs": [3, "x", OBJECT, [1], {"a": 1}, {"stochastic": "yes"}],
        "last_layer_name": [3, OBJECT, ["a"]], "subnetwork_indices": [3, "x", OBJECT, [0]],
        "feature_reduction": without(CHOICE, None),
    }),
    "fit": keywords(fresh_fit, {
        "data": without(LOADER, None), "override": FLAG, "progress_bar": FLAG, "n_data": without(COUNT, None),
        "tolerance": without(POSITIVE, None), "checkpoint_dir": [3, 1.5, OBJECT],
    }) | {"likelihood of targets": (lambda y: posterior().fit(loader(y)), [R, Y[:, None].repeat(1, 2), Y - 1, Y + 9]),
          "model": (lambda m: DebiasedLaplace(m, "classification").fit(loader()), MODEL[5:])},
    "cost": {"data": (lambda data: posterior().cost(data), without(LOADER, None))},
    "la(x)": {"x": (LA, INPUTS)} | keywords(lambda **o: LA(X, **o), {
        "pred_type": CHOICE, "joint": FLAG, "link_approx": CHOICE, "diagonal_output": FLAG, "generator": GENERATOR,
        "fitting": FLAG, "link_aprox": ["mc"], "n_sample": [3], "anything": [OBJECT],
    }) | keywords(lambda **o: LA(X, **{"link_approx": "mc", **o}), {"n_samples": COUNT})
    | {"of regression": (LAR, INPUTS), "before fit": (posterior(), [X])},
    "functional_samples": {"x": (LA.functional_samples, INPUTS)} | keywords(
        lambda **o: LA.functional_samples(X, **o),
        {"pred_type": CHOICE, "n_samples": COUNT, "diagonal_output": FLAG, "generator": GENERATOR}),
    "predictive_samples": {"x": (LA.predictive_samples, INPUTS)} | keywords(
        lambda **o: LA.predictive_samples(X, **o),
        {"pred_type": CHOICE, "n_samples": COUNT, "diagonal_output": FLAG, "generator": GENERATOR}),
    "sample": keywords(LA.sample, {"n_samples": COUNT, "generator": GENERATOR}),
    "log_prob": {"value": (LA.log_prob, [None, 3, "x", OBJECT, TWO, [0.1]])},
    "functional_variance": {"Js": (LA.functional_variance, [None, 3, "x", OBJECT, TWO, torch.zeros(2, 3, 9)])},
    "gaussian_logits": {"x": (LA.gaussian_logits, INPUTS)},
    "confidence_intervals": keywords(LA.confidence_intervals, {"level": SHARE}),
    "attributes": {name: (lambda v, n=name: setattr(fitted("regression"), n, v), wrong) for name, wrong in {
        "prior_precision": PRIOR, "prior_mean": ["0.3", None, NAN, INF, TWO, OBJECT, 1j, {}],
        "sigma_noise": without(POSITIVE, None), "temperature": POSITIVE}.items()},
    "optimize_prior_precision": keywords(tuned, {
        "method": CHOICE, "n_steps": COUNT, "lr": POSITIVE, "init_prior_prec": PRIOR, "prior_structure": CHOICE,
        "verbose": FLAG, "progress_bar": without(FLAG, None),
    }) | {f"{k}, grid": v for k, v in keywords(lambda **o: tuned(method="gridsearch", **o), {
        "pred_type": CHOICE, "val_loader": LOADER, "loss": [3, "nll", OBJECT, [1], lambda p, y: "x"],
        "log_prior_prec_min": [*SHARE[:2], NAN, INF, TWO, OBJECT, 1j], "log_prior_prec_base": without(POSITIVE, 1),
        "log_prior_prec_max": [*SHARE[:2], NAN, INF, TWO, OBJECT, 1j], "grid_size": COUNT, "link_approx": CHOICE,
        "n_samples": COUNT,
    }).items()},
    "held_out_kl": {
        "loader": (LAH.held_out_kl, without(LOADER, None)),
        "fitted_loader": (lambda v: LAH.held_out_kl(REST, v), without(LOADER, None)),
        "posterior": (lambda v: held_out_kl(v, REST), [None, 3, "x", OBJECT, mlp()[0]]),
    } | keywords(lambda **o: held_out_kl(LAH, REST, **o), {
        "n_data": without(COUNT, None), "temperature": without(POSITIVE, None), "progress_bar": FLAG})
    | keywords(lambda **o: held_out_kl(LAH, loader(), **o), {
        "n_rows": without(COUNT, None), "seed": without(COUNT, None)}),
    "load_state_dict": {"state": (LA.load_state_dict, [None, 3, "x", OBJECT, {}, [1], {"a": 1}])},
    "evaluate": keywords(evaluated, EVALUATE_OPTIONS) | {
        "sigma_noise": (lambda v: evaluate(mlp()[0], loader(R), task="regression", sigma_noise=v, **SMALL),
                        without(POSITIVE, None, [0.3, 0.7])),
    },
    "calibration_report": keywords(report, REPORT_OPTIONS | {
        "predictions": [3, "x", OBJECT, {}, [P], {3: P}, *({"a": p} for p in PROBABILITIES)],
        "targets": TARGETS, "task": CHOICE, "observation_noise": [0.3], "target_unit": ["kg"],
        "posteriors": [*MAPPING, {"a": 3}], "validation": [3, "x", OBJECT, (P,), (P, T[:5]), (P, None), P],
        "logits": [*MAPPING, {"c": P}, {"a": 3}, {"a": P[:5]}],
        "ood": [*MAPPING, {"far": 3}, {"far": {"a": P}}, {3: {"a": P, "b": S}}, {"far": {"a": P[:, :2], "b": S}}],
    }) | {"dtype of targets": (lambda v: report({"a": P}, v), [np.array(T, dtype="M8[s]"), np.array([None] * 60)])},
    "calibration_report, regression": keywords(regression, {
        "predictions": [{"a": v} for v in (None, 3, "x", OBJECT, MU, (MU,), (MU, SD, SD), (MU, -SD), (MU, SD[:5]),
                                           (MU, SD * NAN), (MU, "x"), (MU, None), ("x", SD), [], {}, (MU, SD * 1j))],
        "targets": [None, 3, "x", OBJECT, [], MU[:5], MU * NAN, MU * 1j, {}],
        "observation_noise": [0.3], "target_unit": NAME, "validation": [3, "x", OBJECT, (MU, SD), ((MU, SD),), MU],
        "ood": [*MAPPING, {"far": 3}, {"far": {"a": MU}}],
    }) | {
        "noise": (lambda v: regression({"a": torch.stack([MU, MU + 0.1])}, observation_noise=v),
                  [*POSITIVE[:5], OBJECT, 1j, {}, torch.ones(3)]),
        "Gaussian": (lambda v: regression({"a": Gaussian(*v)}), [(MU,), (MU, SD, SD), ("x", SD), (MU, "x")]),
        "Samples": (lambda v: regression({"a": Samples(v, 0.3)}), [None, 3, "x", OBJECT, MU, [], {}]),
    },
    "report": {
        "save": (lambda v: REPORT.save(FOLDER, formats=v), [3, None, "html", OBJECT, ["pdf"], [], [3], TWO]),
        "save to": (REPORT.save, [3, None, OBJECT, [1]]),
        "check": (REPORT.check, [3, None, OBJECT, {}, [], {"a": 1}, [3], [{"metric": "nope", "max": 1.0}],
                                 [{"metric": "nll", "max": "x"}], [{"metric": "nll"}]]),
        "to_frame": (REPORT.to_frame, CHOICE),
        "from_json": (type(REPORT).from_json, [3, None, OBJECT, "{}", "[]", [1]]),
        "table": (lambda v: ReportTable(*v), [(3, ["a"], [[1]]), ("t", 3, [[1]]), ("t", ["a"], 3), ("t", ["a"], [3]),
                                              ("t", ["a"], [[OBJECT]]), ("t", ["a"], [[1, 2]]), ("t", ["a"], ["b"])]),
        "figure": (lambda v: ReportFigure(*v), [(3, "<svg/>", "x"), ("t", 3, "x"), ("t", "<svg/>", 3), (1, 2, 3)]),
    },
    "newton_step": keywords(stepped, {
        "model": MODEL, "likelihood": LIKELIHOOD,
        "batch": [None, 3, "x", OBJECT, (X,), (X, Y, Y, Y), (X, Y[:5]), (X, R), (X, None), (None, Y), [], {},
                  ("a", "b"),
                  (X[:1], Y[:1]), (X * NAN, Y), (X, Y + 9)],
        "damping": POSITIVE, "magnitudes": CHOICE, "shrinkage": FLAG, "max_iterations": COUNT,
        "regularizer": [OBJECT, "x", -0.3, NAN, TWO, [1], 1j, {}], "curvature": CHOICE,
        "preconditioner": [3, "x", OBJECT, TWO, lambda v: None, lambda v: v[:5]], "stopping": CHOICE,
        "tolerance": POSITIVE, "n_data": without(COUNT, None), "seed": without(COUNT, -1),
    }),
    "DebiasedNewton": keywords(optimizer, {
        "params": [None, 3, "x", OBJECT, [], [3], [torch.nn.Parameter(TWO)], [{"params": 3}]], "model": MODEL[:5],
        "likelihood": LIKELIHOOD, "damping": POSITIVE, "magnitudes": CHOICE, "shrinkage": FLAG, "max_iterations": COUNT,
        "curvature": CHOICE, "stopping": CHOICE, "judging_share": SHARE, "weight_decay": POSITIVE,
        "n_data": without(COUNT, None), "seed": without(COUNT, -1),
    }) | {"closure": (closure_step, [None, 3, "x", OBJECT, lambda: None, lambda: 3, lambda: (X,), lambda: (X, Y[:5]),
                                     lambda: (X, R), lambda: ("a", "b"), lambda: (X * NAN, Y)]),
          "state": (lambda v: optimizer().load_state_dict(v), [None, 3, "x", OBJECT, {}, {"state": 3}])},
    "directional_derivatives": keywords(along, {
        "model": MODEL, "likelihood": LIKELIHOOD, "data": LOADER, "curvature": CHOICE,
        "directions": [None, 3, "x", OBJECT, TWO, V[:5], V * NAN, V.numpy(), V.long(), V * 1j, V[:, :0], [V]],
        "regularizer": [OBJECT, "x", -0.3, NAN, TWO, [1], 1j, {}], "seed": without(COUNT, -1), "progress_bar": FLAG,
    }),
    "quadratic_along": keywords(lambda **o: along(quadratic_along, **o), {
        "model": MODEL, "likelihood": LIKELIHOOD, "data": LOADER, "curvature": CHOICE,
        "directions": [None, 3, "x", OBJECT, TWO, V[:5], V * NAN, V.numpy(), V.long(), V * 1j, V[:, :0], [V]],
        "regularizer": [OBJECT, "x", -0.3, NAN, TWO, [1], 1j, {}], "seed": without(COUNT, -1), "progress_bar": FLAG,
    }),
    "conjugate_gradients": keywords(solved, {
        "matvec": [None, 3, "x", OBJECT, TWO, lambda v: None, lambda v: 3.0, lambda v: v[:1]],
        "b": [None, 3, "x", OBJECT, TWO * NAN, TWO[:, None], TWO.long(), [0.3], TWO * 1j],
        "preconditioner": [3, "x", OBJECT, TWO, lambda v: None, lambda v: v[:1]],
        "max_iterations": COUNT, "tolerance": POSITIVE, "x0": [3, "x", OBJECT, TWO * NAN, TWO[:1], [0.3]],
        "keep_directions": FLAG,
    }),
    "Regularizer": {
        "precision": (lambda v: stepped(regularizer=Regularizer(v, n_data=50)), POSITIVE),
        "mean": (lambda v: stepped(regularizer=Regularizer(0.3, v, n_data=50)), ["x", OBJECT, NAN, TWO, 1j, {}]),
        "n_data": (lambda v: stepped(regularizer=Regularizer(0.3, n_data=v)), without(COUNT, None)),
    },
    "diagnose": keywords(diagnosed, {
        "model": MODEL, "likelihood": LIKELIHOOD, "loader": LOADER,
        "batch_sizes": [3, "x", OBJECT, [], ["a"], [2.5], [True], [-1], [NAN], [OBJECT], {}, TWO, [None]],
        "n_draws": COUNT, "n_reference": COUNT, "n_data": without(COUNT, None), "curvature": CHOICE,
        "damping": POSITIVE, "prior_precision": without(POSITIVE, None), "seed": without(COUNT, -1),
        "progress_bar": FLAG,
    }),
}  # fmt: skip


def describe(value):
    text = (
        f"{type(value).__name__} {value!r}" if not isinstance(value, torch.Tensor) else f"Tensor {tuple(value.shape)}"
    )
    return text.split(" at 0x")[0].replace("\n", " ")[:60]


def outcome(call, value):
    try:
        call(value)
    except BaseException as error:
        return [cls.__name__ for cls in type(error).__mro__], str(error)
    return [], ""


if __name__ == "__main__":
    found = {}
    for entry, arguments in CASES.items():
        if len(sys.argv) > 1 and entry not in sys.argv[1:]:
            continue
        for name, (call, values) in arguments.items():
            for i, value in enumerate(values):
                found[f"{entry}, {name}: {i} {describe(value)}"] = outcome(call, value)
    print(json.dumps(found))
