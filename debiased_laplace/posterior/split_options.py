"""Which samples do what, as the user wants it: from the constructor's amounts to drawn sub-batches."""

from dataclasses import dataclass

from torch import Tensor

from debiased_laplace.data.splitting import Amount, SubBatches, draw_sub_batches
from debiased_laplace.debiasing.options import Request


@dataclass(frozen=True)
class SplitOptions:
    """How the samples are divided; the names are those of the public constructor."""

    direction_samples: Amount
    magnitude_samples: Amount | None
    seed: int

    def draw(
        self, indices: Tensor, request: Request, n_data: int | None, direction_share: float | None = None
    ) -> SubBatches:
        """The sub-batches of an estimator; all samples together where it is still to be chosen.

        Args:
            indices: of the samples that there are.
            request: what is asked for.
            n_data: size of the data set that the likelihood stands for.
            direction_share: of the samples used, as it was chosen; None: as given.

        Raises:
            ValueError: if the amounts do not fit into the samples, for any estimator that may be chosen.
        """
        if request.open:
            self._check_open(indices, request, n_data)
        directions, magnitudes = self.direction_samples, self.magnitude_samples
        options = request.options
        if direction_share is not None and options.magnitudes == "held_out" and magnitudes is None:
            directions = round(direction_share * len(indices))
        return draw_sub_batches(
            indices,
            direction_samples=directions,
            magnitude_samples=magnitudes,
            shared=bool(request.open) or options.magnitudes != "held_out",
            n_data=n_data,
            seed=self.seed,
            n_folds=options.n_folds if options.magnitudes == "cross_fitted" and not request.open else None,
        )

    def _check_open(self, indices: Tensor, request: Request, n_data: int | None) -> None:
        """Refuse amounts that would turn out not to fit once the long work is done."""
        if "direction_samples" in request.open and self.magnitude_samples is not None:
            raise ValueError(
                "direction_samples='auto' shares all samples out between directions and magnitudes: expected "
                f"magnitude_samples=None; got {self.magnitude_samples!r}."
            )
        n = len(indices)
        trials = request.trials(self.direction_share(n), 0) if n else []
        for trial in {(t.options.magnitudes, t.direction_share): t for t in trials}.values():
            self.draw(indices, Request(trial.options), n_data, trial.direction_share)

    def direction_share(self, n: int) -> float:
        """The share of the samples used that give directions."""
        first, second = (
            0 if amount is None else amount * n if isinstance(amount, float) else amount
            for amount in (self.direction_samples, self.magnitude_samples)
        )
        return first / (n if self.magnitude_samples is None else first + second)
