"""Low rank plus diagonal: directions of some samples, magnitudes from others, and what is outside the directions."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from debiased_laplace.curvature.kronecker import KroneckerFactors, kronecker_basis
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import Aspect, DirectionalMoments
from debiased_laplace.debiasing import complement as outside
from debiased_laplace.debiasing.complement import RESIDUAL_OF, ComplementKind, LowRankCurvature
from debiased_laplace.debiasing.cross_fitting import Question, cross_fitted_moments
from debiased_laplace.debiasing.directions import REQUESTED, find_directions, threshold_of
from debiased_laplace.debiasing.kronecker import basis_without, factors_of
from debiased_laplace.debiasing.magnitudes import (
    Magnitudes,
    cross_fitted,
    held_out,
    moments_from_projections,
    same_batch,
)
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.linalg.eigenpairs import Eigenpairs, numerical_rank
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis


@dataclass(frozen=True)
class LowRankChoice:
    """In what low-rank estimates from the same samples can differ without much being computed twice.

    Attributes:
        rank: number of directions; None: all that the samples support.
        complement: of the directions.
        in_sample: the biased way, what the direction samples say themselves, whatever other samples there are; of a
            curvature that draws nothing.
    """

    rank: int | None
    complement: ComplementKind
    in_sample: bool = False


def estimate_low_ranks(
    split: SplitCurvature, options: EstimatorOptions, choices: Sequence[LowRankChoice]
) -> list[CurvatureEstimate]:
    """Several low-rank estimates that share their directions, those of smaller rank taking the leading ones.

    Args:
        split: curvature of the samples, by what they are used for.
        options: all but what the choices say.
        choices: of each.

    Returns:
        An estimate for each choice.
    """
    a = split.directions
    in_basis = any(choice.complement == "kron" for choice in choices)
    if (in_basis or len(choices) > 1) and isinstance(a, RowCurvature):
        a.keep_rows()
    ranks = [choice.rank for choice in choices]
    largest = None if None in ranks else max((rank for rank in ranks if rank is not None), default=None)
    threshold = min(_threshold(options, rank) for rank in ranks)
    # first: a Hessian that does not fit is found out before Lanczos has done its work
    factors = factors_of(a, options)[0] if in_basis else None
    basis = None if factors is None else kronecker_basis(factors, a.network.like.dtype)
    pairs = find_directions(a, rank=largest, solver=options.solver, seed=options.seed, threshold=threshold)
    questions = []
    for choice in choices:
        threshold = _threshold(options, choice.rank)
        k = min(len(pairs.values) if choice.rank is None else choice.rank, numerical_rank(pairs.values, threshold))
        questions.append(Question(k, threshold, RESIDUAL_OF[choice.complement], choice.complement == "kron"))
    asked = list(dict.fromkeys(questions))
    owns = dict(zip(asked, _owns(split, pairs, asked, basis), strict=True))
    asked = list(dict.fromkeys(q for q, choice in zip(questions, choices, strict=True) if not choice.in_sample))
    others = dict(zip(asked, _others(split, pairs, asked, factors, basis, options), strict=True))
    estimates = []
    for choice, question in zip(choices, questions, strict=True):
        leading = pairs if question.rank == len(pairs.values) else pairs.leading(question.rank)
        along = None if choice.in_sample else others[question]
        evidence = Evidence(owns[question], along, basis if question.in_basis else None)
        magnitudes = _magnitudes(split, leading, evidence)
        curvature = _with_complement(leading, magnitudes, evidence, choice.complement, split.share)
        source = (a if split.magnitudes is None else split.magnitudes).source
        estimates.append(CurvatureEstimate(curvature, magnitudes, pairs.outcome, source, leading.dropped))
    return estimates


def _threshold(options: EstimatorOptions, rank: int | None) -> float:
    return REQUESTED if options.structure == "full" else threshold_of(rank)


def _others(
    split: SplitCurvature,
    pairs: Eigenpairs,
    questions: list[Question],
    factors: list[KroneckerFactors] | None,
    basis: KroneckerBasis | None,
    options: EstimatorOptions,
) -> list[DirectionalMoments | None]:
    """What other samples say: those of the magnitudes, or every fold along the directions of the other folds."""
    b = split.magnitudes
    if not questions:
        return []
    if b is not None:
        if len(questions) > 1 and isinstance(b, RowCurvature):
            b.keep_rows()
        return list(b.nested_moments(pairs.vectors, [_aspect(q, basis) for q in questions]))
    if split.effective_folds is None:
        return [None] * len(questions)
    a = split.directions
    basis_of = None if factors is None else lambda fold: basis_without(a, factors, fold, options)
    found = cross_fitted_moments(a, split.effective_folds, pairs, questions, seed=options.seed, basis_of=basis_of)
    return list(found)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the samples say along the directions and outside them.

    Attributes:
        own: of the samples that the directions come from, where their eigenvalues are not all of it.
        others: of the samples that the magnitudes come from, or of the folds; None for the biased estimate.
        basis: in which the diagonal outside is; None for the axes.
    """

    own: DirectionalMoments | None
    others: DirectionalMoments | None
    basis: KroneckerBasis | None


def _aspect(question: Question, basis: KroneckerBasis | None) -> Aspect:
    return Aspect(question.rank, question.residual, basis if question.in_basis else None)


def _owns(
    split: SplitCurvature, pairs: Eigenpairs, questions: list[Question], basis: KroneckerBasis | None
) -> list[DirectionalMoments | None]:
    """What the direction samples say, where their eigenvalues are not all of it."""
    a = split.directions
    has_others = split.magnitudes is not None or split.effective_folds is not None
    # the draws that the directions were chosen by would count twice
    again = a.redrawn() if has_others else a
    wanted = [q.residual != "none" or again is not a for q in questions]
    found = iter(
        again.nested_moments(
            pairs.vectors, [_aspect(q, basis) for q, want in zip(questions, wanted, strict=True) if want]
        )
        if any(wanted)
        else []
    )
    return [next(found) if want else None for want in wanted]


def _magnitudes(split: SplitCurvature, pairs: Eigenpairs, evidence: Evidence) -> Magnitudes:
    a, others = split.directions, evidence.others
    redrawn = evidence.own if a.is_random else None
    if split.magnitudes is not None and others is not None:
        return held_out(pairs.values, others, n_a=a.n_samples, n_data=split.n_data, a_redrawn=redrawn)
    if others is not None:
        return cross_fitted(pairs.values, others, n_data=split.n_data, redrawn=redrawn, decreasing=True)
    if evidence.own is not None:
        own = evidence.own
    elif pairs.projections is not None:
        own = moments_from_projections(pairs.projections, a.n_samples)
    else:
        own = a.moments(pairs.vectors)
    return same_batch(pairs.values, own, n_data=split.n_data, drawn=a.is_random)


def _with_complement(
    pairs: Eigenpairs, magnitudes: Magnitudes, evidence: Evidence, kind: ComplementKind, share: float
) -> LowRankCurvature:
    """The low rank with what is outside it, weighted as a finite population wants it."""
    U, m = pairs.vectors, magnitudes.values
    own, others = evidence.own, evidence.others
    weighted = [(share if others is not None else 1.0, own), (1 - share, others)]
    parts = [(weight, part) for weight, part in weighted if part is not None]
    if kind == "none":
        return outside.without_complement(U, m)
    if kind == "isotropic":
        return outside.isotropic(U, m, _sum([(w, part.trace) for w, part in parts]))
    return outside.diagonal(U, m, _sum([(w, part.residual_diagonal) for w, part in parts]), evidence.basis)


def _sum(terms: list[tuple[float, Tensor | None]]) -> Tensor:
    known = [weight * value for weight, value in terms if value is not None]
    return sum(known[1:], start=known[0])
