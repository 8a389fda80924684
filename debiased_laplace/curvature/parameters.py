"""Which parameters the posterior is over, and the one place that flattens them."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

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
        if not isinstance(model, nn.Module):
            raise ValueError(f"Expected model as a torch.nn.Module; got {type(model).__name__}.")
        selected = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not selected:
            raise ValueError("The model has no trainable parameters; expected at least one with requires_grad=True.")
        kinds = {(p.dtype, p.device) for p in selected.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"Expected trainable parameters of one dtype on one device; got {found}.")
        (dtype,) = {dtype for dtype, _ in kinds}
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Expected parameters in torch.float32 or torch.float64; got {dtype}: convert the model.")
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

    @cached_property
    def _places(self) -> dict[str, str]:
        """Every place at which a selected parameter stands, each module once, and the parameter's own name.

        `functional_call`'s own handling of ties does not put a module back that is registered under two names.
        """
        own = {id(p): name for name, p in self.model.named_parameters() if name in set(self.names)}
        return {
            f"{path}.{local}" if path else local: own[id(p)]
            for path, module in self.model.named_modules()
            for local, p in module._parameters.items()
            if id(p) in own
        }

    def call(self, parameters: dict[str, Tensor], inputs: Tensor, model_kwargs: dict[str, Any] | None = None) -> Tensor:
        """The model's outputs with these values in place of the selected parameters.

        Raises:
            ValueError: if the model returns anything but a tensor.
        """
        placed = {place: parameters[name] for place, name in self._places.items()}
        outputs: object = functional_call(self.model, placed, (inputs,), model_kwargs, tie_weights=False)
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
