"""Memory that an estimate takes beyond rows and directions, and what a limit leaves for rows."""

import math
import warnings
from dataclasses import replace

import torch

from debiased_laplace.curvature.kronecker import matrix_shapes
from debiased_laplace.curvature.memory import CHUNK_BYTES, free_memory
from debiased_laplace.curvature.network import Network
from debiased_laplace.debiasing.options import EstimatorOptions

# vectors of P in double precision that a fit takes at once: the weights, and sums over samples and over folds
_VECTORS_IN_BASIS = 20
_VECTORS = {"none": 1, "isotropic": 1, "diagonal": 6}
_MATRICES = 4  # for each Kronecker factor: of all samples, of a fold, and their eigenvectors


def is_in_basis(options: EstimatorOptions) -> bool:
    """Return whether the curvature, or the complement of its directions, is in a Kronecker basis."""
    return "kron" in (options.structure, options.complement)


def sides_with_eigenvectors(network: Network, options: EstimatorOptions) -> list[tuple[int, list[int]]]:
    """Return the size of each parameter, and the lengths of its sides that have eigenvectors."""
    if not is_in_basis(options):
        return []
    layers_only = options.kron_basis == "kfac"
    shapes = matrix_shapes(network.selection, layers_only=layers_only, largest_side=network.largest_side)
    return [(shape.n_entries, [side.size for side in (shape.rows, shape.columns) if side.full]) for shape in shapes]


def bytes_beyond_rows(network: Network, options: EstimatorOptions) -> dict[str, int]:
    """Return the memory of the eigenvectors of Kronecker factors, and of vectors of all parameters, in bytes."""
    squares = sum(side**2 for _, sides in sides_with_eigenvectors(network, options) for side in sides)
    n_vectors = _VECTORS_IN_BASIS if is_in_basis(options) else _VECTORS[options.complement or "none"]
    return {"eigenvectors": _MATRICES * squares * 8, "vectors of P": n_vectors * network.n_parameters * 8}


def bytes_of_directions(network: Network, options: EstimatorOptions, rank: int) -> int:
    """Return the memory of so many directions in bytes."""
    itemsize = 2 if options.directions_dtype == "bfloat16" else network.like.element_size()
    return math.ceil(rank * network.n_parameters * itemsize * network.share)


def leaving_room(network: Network, options: EstimatorOptions, n_rows: int) -> Network:
    """Return the network with the memory that an estimate leaves for rows and batches.

    Args:
        network: the network.
        options: of the estimate.
        n_rows: largest number of rows, and so of directions.

    Raises:
        ValueError: if the limit, or without one the device, does not have what the estimate takes in any case.

    Warns:
        UserWarning: if sides of parameters keep their axes, because their eigenvectors do not fit.
    """
    P, free, directions = network.n_parameters, free_memory(network.like.device), 0
    if options.structure != "kron" and options.rank is not None and _take_memory(options, network.like.device):
        directions = bytes_of_directions(network, options, min(options.rank, n_rows, P))
    least = network.capabilities.activation_bytes + CHUNK_BYTES
    limit = free - directions if network.memory is None else min(network.memory - least, free - directions)
    network = _with_sides_within(network, options, limit)
    needed = sum(bytes_beyond_rows(network, options).values())
    in_basis = options.structure == "lowrank" and is_in_basis(options)
    smaller = "complement='isotropic' or 'none', or fewer parameters" if in_basis else "fewer parameters"
    if needed + directions > free:
        raise ValueError(
            f"A fit of {P:,} parameters takes {(needed + directions) / 2**30:.2g} GiB beyond the model and rows, of "
            f"which the directions are {directions / 2**30:.2g}, and {free / 2**30:.2g} GiB are free; expected "
            f"{'a smaller rank, ' if in_basis else 'a smaller rank or ' if directions else ''}{smaller}."
        )
    if network.memory is None:
        return network
    least += needed
    if least > network.memory:
        raise ValueError(
            f"memory={network.memory} bytes do not suffice for a fit of {P:,} parameters with "
            f"{_described(options)}, which takes {needed / 2**30:.2g} GiB beyond the model, rows and directions; "
            f"expected at least memory={least}, or {smaller}."
        )
    left = network.memory - needed
    return replace(network, memory=left - replace(network, memory=left).bytes_of_activations(n_rows))


def _with_sides_within(network: Network, options: EstimatorOptions, limit: int) -> Network:
    """Return the network with axes for the longest sides, as many as have eigenvectors that do not fit into a limit."""
    # K-FAC's layers have complete factors
    if options.kron_basis == "kfac":
        return network
    sides = sorted({side for _, sides in sides_with_eigenvectors(network, options) for side in sides}, reverse=True)
    taken = bytes_beyond_rows(network, options)
    for largest in [network.largest_side, *sides[1:], 1]:
        smaller = replace(network, largest_side=largest)
        if sum(bytes_beyond_rows(smaller, options).values()) <= limit:
            break
    else:
        # too little without any as well
        return smaller
    if smaller.largest_side < network.largest_side:
        warnings.warn(
            f"Eigenvectors of all Kronecker factors take {taken['eigenvectors'] / 2**30:.2g} GiB, for which there is "
            f"not enough memory: sides of weight matrices longer than {largest:,} keep their axes. Expected a larger "
            "memory.",
            stacklevel=2,
        )
    return smaller


def _take_memory(options: EstimatorOptions, device: torch.device) -> bool:
    """Return whether directions are held in the memory of a device."""
    where = options.directions_device
    return where == "model" or (where == "cpu" and device.type == "cpu")


def _described(options: EstimatorOptions) -> str:
    if options.structure == "lowrank":
        return f"complement={options.complement!r}"
    return f"hessian_structure={options.structure!r}"
