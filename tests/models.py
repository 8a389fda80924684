"""Small networks of every kind, with fixed weights and data, of few enough parameters for dense oracles.

Each builder gives `(model, X)`: the model in evaluation mode, and about 40 samples of inputs. The caller's random
state is left alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

N_SAMPLES = 40

Build = Callable[..., tuple[nn.Module, Tensor]]


def mlp(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Two hidden layers, P = 4*7+7 + 7*5+5 + 5*C+C."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, n_outputs))
        return _finished(model, torch.randn(N_SAMPLES, 4), dtype)


def cnn(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Convolutions and pooling."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 2),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(3, n_outputs),
        )
        return _finished(model, torch.randn(N_SAMPLES, 1, 8, 8), dtype)


def batch_norm_net(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Batch normalization after a convolution and after a linear layer, with running statistics of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(13)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 6),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, n_outputs),
        )
        for layer in (model[1], model[5]):
            layer.running_mean.normal_(std=0.5)
            layer.running_var.uniform_(0.5, 3.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
        return _finished(model, torch.randn(N_SAMPLES, 1, 4, 4), dtype)


class _LayerNormNet(nn.Module):
    def __init__(self, n_outputs: int):
        super().__init__()
        self.scale = nn.Parameter(0.5 + torch.rand(4, 6))  # a raw matrix, ahead of every layer
        self.embed = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, n_outputs, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.7))  # a raw scalar

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(x))
        return self.head(self.norm(hidden + hidden[:, :4] @ self.scale)) / self.temperature


def layer_norm_net(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Layer normalization, and raw parameters: a matrix and a scalar."""
    with torch.random.fork_rng():
        torch.manual_seed(14)
        return _finished(_LayerNormNet(n_outputs), torch.randn(N_SAMPLES, 5), dtype)


class _Recurrent(nn.Module):
    def __init__(self, recurrent: nn.RNNBase, n_outputs: int):
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def lstm_classifier(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """An LSTM over five steps, read at the last."""
    with torch.random.fork_rng():
        torch.manual_seed(15)
        model = _Recurrent(nn.LSTM(3, 4, batch_first=True), n_outputs)
        return _finished(model, torch.randn(N_SAMPLES, 5, 3), dtype)


def gru_classifier(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A GRU over five steps, read at the last."""
    with torch.random.fork_rng():
        torch.manual_seed(16)
        model = _Recurrent(nn.GRU(3, 4, batch_first=True), n_outputs)
        return _finished(model, torch.randn(N_SAMPLES, 5, 3), dtype)


class _Transformer(nn.Module):
    def __init__(self, n_outputs: int):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def transformer_classifier(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A transformer encoder layer with dropout, averaged over five positions."""
    with torch.random.fork_rng():
        torch.manual_seed(17)
        return _finished(_Transformer(n_outputs), torch.randn(N_SAMPLES, 5, 4), dtype)


def partly_frozen_net(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A frozen layer between trainable ones, and a frozen bias."""
    with torch.random.fork_rng():
        torch.manual_seed(18)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, n_outputs))
        model[2].requires_grad_(False)
        model[4].bias.requires_grad_(False)
        return _finished(model, torch.randn(N_SAMPLES, 4), dtype)


class _ResidualBlock(nn.Module):
    def __init__(self, stride: int):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(2)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(2, 2, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def resnet(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Two residual blocks, the second one with a stride, and running statistics of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3, bias=False),
            nn.BatchNorm2d(2),
            _ResidualBlock(1),
            _ResidualBlock(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, n_outputs),
        )
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.3)
                layer.running_var.uniform_(0.5, 2.0)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, mean=0.3, std=0.3)
        return _finished(model, torch.randn(N_SAMPLES, 1, 6, 6), dtype)


class _Reused(nn.Module):
    def __init__(self, n_outputs: int):
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.head = nn.Linear(4, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return self.head(x)


def reused_module_net(n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """One layer that is called three times, and a head."""
    with torch.random.fork_rng():
        torch.manual_seed(21)
        return _finished(_Reused(n_outputs), torch.randn(N_SAMPLES, 4), dtype)


MODELS: dict[str, Build] = {
    "MLP": mlp,
    "convolutions and pooling": cnn,
    "BatchNorm": batch_norm_net,
    "LayerNorm and raw parameters": layer_norm_net,
    "LSTM": lstm_classifier,
    "GRU": gru_classifier,
    "transformer": transformer_classifier,
    "partly frozen": partly_frozen_net,
    "ResNet with BatchNorm": resnet,
    "reused module": reused_module_net,
}


def targets(likelihood: str, n: int = N_SAMPLES, n_outputs: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Labels (n,) that name every class, or real targets (n, C)."""
    generator = torch.Generator().manual_seed(19)
    if likelihood == "classification":
        return torch.randint(n_outputs, (n,), generator=generator)
    return torch.randn(n, n_outputs, generator=generator, dtype=torch.float64).to(dtype)


def _finished(model: nn.Module, X: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(1.7)  # freshly drawn weights hardly tell the classes apart
    return model.to(dtype).eval(), X.to(dtype)
