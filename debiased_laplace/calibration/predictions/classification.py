"""Class probabilities and true classes of a test set, reduced at once to a few numbers per sample."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.predictions.class_bins import ClassBins, ClassBinSums
from debiased_laplace.calibration.predictions.labels import read_labels
from debiased_laplace.calibration.predictions.probabilities import Probabilities, mean_prediction, read_probabilities
from debiased_laplace.calibration.predictions.uncertainty import Uncertainty, join, uncertainty_of


@dataclass(frozen=True, eq=False)
class ClassificationPredictions:
    """Class probabilities of one method on a labelled test set; vectors are float64 on the CPU.

    Attributes:
        targets: labels in [0, C).
        predicted: most probable class.
        true_class_probability: probability given to the true class.
        squared_norm: sum of the squared probabilities.
        uncertainty: confidence, entropy and mutual information.
        positive_probability: P(class 1) for two classes, None for more.
        class_bins: every class's probability in bins.
        source: the probabilities as they came, for what needs all of them.
        clusters: number of the independent unit that a sample belongs to (the image of a pixel), from 0 on;
            None where every sample is a unit of its own.
    """

    targets: Int[Tensor, " n"]
    predicted: Int[Tensor, " n"]
    true_class_probability: Float[Tensor, " n"]
    squared_norm: Float[Tensor, " n"]
    uncertainty: Uncertainty
    positive_probability: Float[Tensor, " n"] | None
    class_bins: ClassBins
    source: Probabilities
    clusters: Int[Tensor, " n"] | None = None

    @property
    def n(self) -> int:
        """Number of test samples."""
        return self.targets.numel()

    @property
    def n_classes(self) -> int:
        """Number of classes C."""
        return self.source.n_classes

    @property
    def smallest_probability(self) -> float:
        """Floor of a probability inside a logarithm."""
        return self.source.smallest

    @property
    def confidence(self) -> Float[Tensor, " n"]:
        """Probability of the predicted class."""
        return self.uncertainty.confidence

    @cached_property
    def correct(self) -> Float[Tensor, " n"]:
        """1 where the predicted class is the true one, else 0."""
        return (self.predicted == self.targets).to(torch.float64)

    @property
    def n_impossible(self) -> int:
        """Samples whose true class was given probability 0, or less than a float can say."""
        return int((self.true_class_probability < self.smallest_probability).sum())


def read_classification(
    method: str, probabilities: Any, targets: Any, *, task: Literal["binary", "multiclass"], n_bins: int = 15
) -> ClassificationPredictions:
    """Class probabilities and labels, checked and reduced.

    Cost: one pass over the probabilities on their own device, in float64 and in portions of 8 MB.

    Args:
        method: name of the method, for messages.
        probabilities: (n, C), or posterior samples (S, n, C), numpy, torch or nested lists; for a binary task also
            (n,) = P(class 1).
        targets: labels (n,) or one-hot rows (n, C).
        task: "binary" allows two classes only.
        n_bins: bins of every class's probability.

    Raises:
        ValueError: for anything that is not a set of distributions over classes with its labels.
    """
    p = read_probabilities(method, probabilities, task=task)
    labels = read_labels(targets, n=p.n, n_classes=p.n_classes, where=f"Predictions of {method!r}")
    return reduce_probabilities(p, labels, n_bins=n_bins)


def reduce_probabilities(
    probabilities: Probabilities, labels: Int[Tensor, " n"], *, n_bins: int
) -> ClassificationPredictions:
    """The vectors of `ClassificationPredictions` from checked probabilities and labels."""
    labels = labels.to(probabilities.values.device)
    parts: dict[str, list[Tensor]] = {}
    uncertainties = []
    class_bins = ClassBinSums(probabilities.n_classes, n_bins, labels.device)
    for rows, p in probabilities.portions():
        mean, true = mean_prediction(p), labels[rows]
        squares = mean.square()
        uncertainties.append(uncertainty_of(p))
        class_bins.add(mean, squares, true)
        portion = {
            "predicted": mean.argmax(dim=1),
            "true_class_probability": mean.gather(1, true[:, None])[:, 0],
            "squared_norm": squares.sum(dim=1),
            "positive_probability": mean[:, 1].clone(),  # a view would keep the whole portion
        }
        for name, values in portion.items():
            parts.setdefault(name, []).append(values)
    vectors = {name: torch.cat(values).cpu() for name, values in parts.items()}
    return ClassificationPredictions(
        targets=labels.cpu(),
        predicted=vectors["predicted"],
        true_class_probability=vectors["true_class_probability"],
        squared_norm=vectors["squared_norm"],
        uncertainty=join(uncertainties, probabilities),
        positive_probability=vectors["positive_probability"] if probabilities.n_classes == 2 else None,
        class_bins=class_bins.finish(),
        source=probabilities,
    )
