"""Trained models and tensors that the command line names."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from debiased_laplace.cli.arguments import called


def add_model(parser: argparse._ActionsContainer) -> None:
    """Add what names a trained model, its data and its likelihood."""
    parser.add_argument("--model", required=True, metavar="MODULE:CALLABLE", help="returns the torch.nn.Module")
    parser.add_argument("--weights", type=Path, help="state dict of the trained model (loaded with weights_only=True)")
    parser.add_argument("--loader", required=True, metavar="MODULE:CALLABLE", help="returns the training DataLoader")
    parser.add_argument("--likelihood", required=True, choices=("classification", "regression", "reward_modeling"))


def trained_model(parsed: argparse.Namespace) -> nn.Module:
    """The model, with the trained weights.

    Raises:
        ValueError: if it is none, or the weights are not its own.
    """
    model = called(parsed.model, "--model")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {parsed.model!r} must return a torch.nn.Module; got {type(model).__name__}.")
    if parsed.weights is not None:
        weights = loaded(parsed.weights, "--weights")
        try:
            model.load_state_dict(weights)
        except Exception as error:
            raise ValueError(f"--weights {parsed.weights} does not fit the model: {error}") from error
    return model


def loaded(path: Path, option: str) -> Any:
    """A file that holds tensors and nothing that could run."""
    if not path.is_file():
        raise ValueError(f"{option} {path} is no file.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{option} {path} cannot be loaded with weights_only=True: {first}") from error
