"""Which parameters the posterior is over, and the one place that flattens them."""

from dataclasses import dataclass
from hashlib import sha256

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class ParameterSelection:
    """The parameters of a model that the posterior is over, in `named_parameters` order.

    Attributes:
        model: the user's model, never written to.
        names: of the selected parameters.
        shapes: of the selected parameters.
    """

    model: nn.Module
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def all_weights(cls, model: nn.Module) -> "ParameterSelection":
        """All parameters with `requires_grad`.

        Raises:
            ValueError: if there are none, or they differ in dtype or device.
        """
        selected = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not selected:
            raise ValueError("The model has no trainable parameters; expected at least one with requires_grad=True.")
        kinds = {(p.dtype, p.device) for p in selected.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"Expected trainable parameters of one dtype on one device; got {found}.")
        return cls(model, tuple(selected), tuple(p.shape for p in selected.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def n_parameters(self) -> int:
        """Number P of entries altogether."""
        return sum(self.sizes)

    def vector(self) -> Float[Tensor, " P"]:
        """A flat copy of the model's current values."""
        current = dict(self.model.named_parameters())
        return torch.cat([current[name].detach().reshape(-1) for name in self.names])

    def check_finite(self) -> None:
        """Refuse weights that are NaN or infinite.

        Raises:
            ValueError: naming the first such parameter.
        """
        for name, p in self.model.named_parameters():
            if not bool(p.isfinite().all()):
                raise ValueError(f"Expected finite weights; parameter {name!r} has NaN or infinity.")

    def unflatten(self, vectors: Float[Tensor, "*batch P"]) -> dict[str, Tensor]:
        """Flat vectors as a dictionary of parameters, with the leading dimensions kept."""
        parts = vectors.split(self.sizes, dim=-1)
        lead = vectors.shape[:-1]
        return {
            name: part.reshape(lead + shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def flatten(self, parameters: dict[str, Tensor], n_lead: int = 0) -> Tensor:
        """A dictionary of parameters as flat vectors; the first `n_lead` dimensions are kept."""
        # not `flatten`, which has no answer to a scalar parameter with leading dimensions
        found = [parameters[name] for name in self.names]
        return torch.cat([p.reshape(*p.shape[:n_lead], -1) for p in found], dim=-1)

    def call(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """The model's outputs with these values in place of the selected parameters.

        Raises:
            ValueError: if the model returns anything but a tensor.
        """
        outputs: object = functional_call(self.model, parameters, (inputs,))
        if not isinstance(outputs, Tensor):
            raise ValueError(f"Expected the model to return a tensor; got {type(outputs).__name__}.")
        return outputs

    def fingerprint(self) -> str:
        """A hash of all weights and buffers: two models that compute the same have the same one."""
        digest = sha256()
        # a buffer that is not saved with the model still enters its outputs
        tensors = {**self.model.state_dict(), **dict(self.model.named_buffers())}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
