"""Hugging Face transformers with random weights: every structure and subset against one output at a time."""

import copy
import math
import warnings
from functools import cache

import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from oracles import dense_kl, dense_posterior_precision, mean_of, output_hessian, trainable
from posterior_cases import TEMPERATURE, close, mean_field, posterior_of
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

N, LENGTH, CLASSES, PRIOR = 16, 6, 3, 0.4
PAD = 0


def _bert():
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=5,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        pad_token_id=PAD,
    )
    return transformers.BertForSequenceClassification(config)


def _frozen_bert():
    model = _bert()
    model.bert.requires_grad_(False)
    model.bert.pooler.dense.weight.requires_grad_(True)
    return model


def _gpt2():
    """Reads the last token that is no padding."""
    config = transformers.GPT2Config(
        vocab_size=12,
        n_positions=LENGTH,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=5,
        num_labels=CLASSES,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2ForSequenceClassification(config)


def _distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=12,
        max_position_embeddings=LENGTH,
        dim=4,
        n_layers=2,
        n_heads=2,
        hidden_dim=5,
        num_labels=CLASSES,
        pad_token_id=PAD,
    )
    return transformers.DistilBertForSequenceClassification(config)


def _lora():
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.1
    )
    with warnings.catch_warnings():
        # peft asks transformers 5 by a name that transformers 4 knows
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = peft.get_peft_model(_bert(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)  # they start at zero, where A has no influence
    return model


BUILDERS = {
    "BERT": _bert,
    "BERT with a frozen body": _frozen_bert,
    "GPT-2": _gpt2,
    "DistilBERT": _distilbert,
    "BERT with LoRA adapters": _lora,
}
N_TRAINABLE = {
    "BERT": 268,
    "BERT with a frozen body": 4 * 4 + 3 * 4 + 3,
    "BERT with LoRA adapters": 2 * (2 * 4 + 4 * 2) + 3 * 4 + 3,
}


@cache
def model_of(name):
    """In double precision, never to be changed, and in training mode, as a trainer leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(21)
        model = BUILDERS[name]().double().train()
        for p in model.parameters():
            if p.ndim > 1:
                p.data.normal_(std=0.4)  # a fresh transformer hardly looks at its inputs
    return model


@cache
def samples():
    """Sentences of different length, padded to one."""
    generator = torch.Generator().manual_seed(22)
    lengths = torch.randint(2, LENGTH + 1, (N,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(3, 12, (N, LENGTH), generator=generator) * mask
    labels = torch.randint(CLASSES, (N,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader():
    columns = samples()
    return DataLoader([{k: v[i] for k, v in columns.items()} for i in range(N)], batch_size=5, shuffle=True)


def inputs(n):
    return {key: samples()[key][:n] for key in ("input_ids", "attention_mask")}


def one_by_one(name):
    """Each sample alone, without its padding."""
    model = copy.deepcopy(model_of(name)).eval()
    for ids, mask in zip(samples()["input_ids"], samples()["attention_mask"], strict=True):
        length = int(mask.sum())
        yield model, model(input_ids=ids[None, :length], attention_mask=mask[None, :length]).logits[0]


@cache
def dense(name):
    """Outputs (n, C), Jacobians (n, C, P) and GGN (P, P) of each sample, one output at a time."""
    all_outputs, jacobians, curvatures = [], [], []
    for model, outputs in one_by_one(name):
        rows = []
        for output in outputs:
            gradients = torch.autograd.grad(output, trainable(model), retain_graph=True, allow_unused=True)
            pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, trainable(model), strict=True)]
            rows.append(torch.cat([piece.reshape(-1) for piece in pieces]))
        J = torch.stack(rows)
        all_outputs.append(outputs.detach())
        jacobians.append(J)
        curvatures.append(J.T @ output_hessian(outputs.detach(), "classification") @ J)
    return torch.stack(all_outputs), torch.stack(jacobians), curvatures


def subset_of(name, subset):
    """Constructor's arguments, and the positions of the selected entries among all trainable ones."""
    shapes = {n: p.shape for n, p in model_of(name).named_parameters() if p.requires_grad}
    P = sum(shape.numel() for shape in shapes.values())
    if subset == "all":
        return {}, torch.arange(P)
    if subset == "subnetwork":
        indices = torch.arange(2, P, 3)
        return {"subnetwork_indices": indices}, indices
    head = "score" if name == "GPT-2" else "classifier"
    sizes = [shape.numel() for shape in shapes.values()]
    owned = torch.cat([torch.full((size,), head in n) for n, size in zip(shapes, sizes, strict=True)])
    if name == "DistilBERT":
        owned = torch.cat(
            [torch.full((size,), n.startswith("classifier")) for n, size in zip(shapes, sizes, strict=True)]
        )
    return {}, owned.nonzero()[:, 0]


def fitted(name, subset, structure, **options):
    chosen, own = subset_of(name, subset)
    if structure == "lowrank":
        options = {"rank": 5, **options}
    la = posterior_of(
        model_of(name),
        "classification",
        subset,
        structure,
        prior_precision=PRIOR,
        temperature=TEMPERATURE,
        **{**chosen, **options},
    )
    la.fit(loader(), n_data=40)
    return la, own


def weighted_curvature(la, name, own):
    """f H_a + (1 - f) H_b of the samples that the posterior says it used, on the selected entries."""
    per_sample = dense(name)[2]
    f = len(la.split.direction_indices) / la.n_data
    H_a, H_b = (mean_of(per_sample, i)[own][:, own] for i in (la.split.direction_indices, la.split.magnitude_indices))
    return H_a, f * H_a + (1 - f) * H_b


def check(la, name, own):
    """Curvature along every direction, precision and predictions, from dense matrices."""
    outputs, jacobians, _ = dense(name)
    H_a, H = weighted_curvature(la, name, own)
    operator = la.posterior_precision
    if operator.basis is None:
        U = operator.directions
        leading = torch.linalg.eigvalsh(H_a).flip(0)[: U.shape[1]]
        close(la.in_sample_curvatures, leading, rtol=1e-5)
    else:
        U = operator.basis.to_dense().double()
        close(la.in_sample_curvatures, (U * (H_a @ U)).sum(0), rtol=1e-5)
    close(U.T @ U, torch.eye(U.shape[1]), rtol=1e-9)
    m = (U * (H @ U)).sum(0)
    close(la.directional_curvatures, m, rtol=1e-5)
    estimate = U @ torch.diag(m) @ U.T
    if la.fit_result.estimate.curvature.diagonal.any() and operator.basis is None:
        # full: one mean value where the direction samples say nothing
        rest = (torch.trace(H) - m.sum()) / max(len(H) - len(m), 1)
        estimate = estimate + rest * (torch.eye(len(H)) - U @ U.T)
    P = dense_posterior_precision(estimate, n_data=40, prior_precision=PRIOR, temperature=TEMPERATURE)
    close(operator.to_dense(), P, rtol=1e-5)
    J = jacobians[:4][:, :, own]
    variance = J @ torch.linalg.inv(P) @ J.mT
    shrunk = outputs[:4] / (1 + math.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
    close(la(inputs(4), link_approx="probit"), torch.softmax(shrunk, -1), rtol=1e-5)
    close(la(inputs(4)), mean_field(outputs[:4], variance), rtol=1e-5)


STRUCTURES = {
    "low rank": ("lowrank", {}),
    "low rank by products": ("lowrank", {"solver": "lanczos"}),
    "Kronecker": ("kron", {}),
    "Kronecker in K-FAC's basis": ("kron", {"kron_basis": "kfac"}),
    "full": ("full", {}),
}


ALL_OF_BERT = [
    ("BERT", subset, structure) for subset in ("all", "last_layer", "subnetwork") for structure in STRUCTURES
]
SOME_OF_OTHERS = [
    ("GPT-2", "all", "low rank"),
    ("GPT-2", "all", "Kronecker in K-FAC's basis"),
    ("GPT-2", "last_layer", "full"),
    ("GPT-2", "subnetwork", "low rank by products"),
    ("BERT with LoRA adapters", "all", "low rank"),
    ("BERT with LoRA adapters", "all", "Kronecker"),
    ("BERT with LoRA adapters", "all", "full"),
    ("BERT with LoRA adapters", "last_layer", "low rank by products"),
    ("BERT with LoRA adapters", "subnetwork", "Kronecker"),
    ("BERT with a frozen body", "all", "low rank"),
    ("DistilBERT", "all", "low rank"),
    ("DistilBERT", "last_layer", "Kronecker"),
]


@pytest.mark.parametrize(("name", "subset", "structure"), ALL_OF_BERT + SOME_OF_OTHERS)
def test_posterior_is_the_dense_one(name, subset, structure):
    key, options = STRUCTURES[structure]
    la, own = fitted(name, subset, key, **options)
    assert la.selection.n_parameters == len(own)
    # nothing that is kept hangs on the graph of the rest of the model
    assert not la.fit_result.estimate.curvature.directions.requires_grad
    assert not la.directional_curvatures.requires_grad
    check(la, name, own)


@pytest.mark.parametrize("name", N_TRAINABLE)
def test_trainable_parameters_count(name):
    la = posterior_of(model_of(name), "classification", rank=2)
    assert la.n_params == N_TRAINABLE[name]
    assert all(model_of(name).get_parameter(n).requires_grad for n in la.selection.names)


def test_only_adapters_and_classifier_vary_under_lora():
    la, _ = fitted("BERT with LoRA adapters", "all", "lowrank")
    assert all("lora_" in name or "classifier" in name for name in la.selection.names)
    # B is zero in a fresh adapter, and then A has no curvature: here it has
    start = la.selection.names.index(next(name for name in la.selection.names if "lora_A" in name))
    of_A = slice(sum(la.selection.sizes[:start]), sum(la.selection.sizes[: start + 1]))
    assert la.directions[of_A].abs().max() > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_model_is_left_alone(name):
    model = model_of(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    assert any(modes.values())
    la, _ = fitted(name, "all", "kron", kron_basis="kfac")
    la(inputs(2))
    la(inputs(2), pred_type="nn", link_approx="mc", n_samples=2)
    la.functional_samples(inputs(2), n_samples=2)
    la.optimize_prior_precision(n_steps=2)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_padding_does_not_matter(name):
    la, _ = fitted(name, "all", "lowrank")
    x = inputs(4)
    longest = int(x["attention_mask"].sum(1).max())
    assert longest < LENGTH or bool((x["attention_mask"].sum(1) < longest).any())
    torch.testing.assert_close(la({k: v[:, :longest] for k, v in x.items()}), la(x), rtol=1e-8, atol=1e-10)
    one = int(x["attention_mask"][0].sum())
    alone = la({k: v[:1, :one] for k, v in x.items()})
    torch.testing.assert_close(alone, la(x)[:1], rtol=1e-8, atol=1e-10)


def test_batches_padded_by_transformers():
    class Collator:
        """As `DataCollatorWithPadding`, which needs a tokenizer only for its pad token."""

        def __call__(self, items):
            longest = max(len(item["input_ids"]) for item in items)
            rows = [item["input_ids"] + [PAD] * (longest - len(item["input_ids"])) for item in items]
            ids = torch.tensor(rows)
            labels = torch.tensor([item["label"] for item in items])
            return transformers.BatchEncoding(
                {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
            )

    columns = samples()
    rows = [
        {"input_ids": ids[: int(mask.sum())].tolist(), "label": int(label)}
        for ids, mask, label in zip(*columns.values(), strict=True)
    ]
    expected, _ = fitted("BERT", "all", "lowrank")
    la = posterior_of(model_of("BERT"), "classification", rank=5, prior_precision=PRIOR, temperature=TEMPERATURE)
    la.fit(DataLoader(rows, batch_size=3, collate_fn=Collator()), n_data=40)
    assert torch.equal(la.split.direction_indices, expected.split.direction_indices)
    torch.testing.assert_close(la.directional_curvatures, expected.directional_curvatures, rtol=1e-7, atol=1e-10)
    encoding = Collator()(rows[:4])
    torch.testing.assert_close(la(encoding), expected(inputs(4)), rtol=1e-7, atol=1e-10)


BACKEND_CASES = {
    "low rank": ("lowrank", {}),
    "Kronecker": ("kron", {}),
    "Kronecker in K-FAC's basis": ("kron", {"kron_basis": "kfac"}),
}


@pytest.mark.parametrize("structure", BACKEND_CASES)
@pytest.mark.parametrize("subset", ["all", "last_layer", "subnetwork"])
def test_a_backend_takes_the_model(subset, structure):
    key, options = BACKEND_CASES[structure]
    with warnings.catch_warnings():
        # curvlinops has no K-FAC for embeddings and layer normalization
        warnings.filterwarnings("ignore", message="CurvlinopsGGN cannot compute the Kronecker factors")
        la, own = fitted("BERT", subset, key, backend=CurvlinopsGGN, **options)
    assert "CurvlinopsGGN" in la.curvature_source
    check(la, "BERT", own)


def test_a_backend_that_reads_every_position_of_the_last_layer_is_not_used():
    # GPT-2's last layer acts on all positions, of which one is read afterwards: laplace-torch's Jacobian is not that
    with pytest.warns(UserWarning, match="CurvlinopsGGN cannot compute the Jacobians"):
        la, own = fitted("GPT-2", "last_layer", "lowrank", backend=CurvlinopsGGN)
    assert "CurvlinopsGGN" not in la.curvature_source
    check(la, "GPT-2", own)


@pytest.mark.parametrize("name", ["GPT-2", "BERT with LoRA adapters"])
def test_whole_chain(name):
    columns = samples()
    parts = [[{k: v[i] for k, v in columns.items()} for i in range(*ends)] for ends in ((0, 10), (10, N))]
    inside, outside = (DataLoader(part, batch_size=4) for part in parts)
    la = posterior_of(
        model_of(name), "classification", rank=5, direction_samples=6, prior_precision=PRIOR, temperature=TEMPERATURE
    )
    la.fit(inside, n_data=N)
    found = la.held_out_kl(outside, inside)
    H = mean_of(dense(name)[2], torch.arange(N))
    full_batch = dense_posterior_precision(H, n_data=N, prior_precision=PRIOR, temperature=TEMPERATURE)
    # the six samples left out are all the rest, so that nothing is left to chance; the constant is the reference's own
    constant = -0.5 * float(torch.linalg.slogdet(full_batch)[1]) - 0.5 * len(H)
    expected = dense_kl(la.posterior_precision.to_dense(), full_batch)
    assert found.value + constant == pytest.approx(expected, rel=1e-7)

    loaded = posterior_of(model_of(name), "classification")
    loaded.load_state_dict(la.state_dict())
    for call in (
        lambda p: p(inputs(3)),
        lambda p: p(inputs(3), link_approx="mc", generator=torch.Generator().manual_seed(1)),
        lambda p: p(inputs(3), pred_type="nn", link_approx="mc", generator=torch.Generator().manual_seed(1)),
        lambda p: p.functional_samples(inputs(3), n_samples=2, generator=torch.Generator().manual_seed(1)),
    ):
        torch.testing.assert_close(call(loaded), call(la), rtol=1e-9, atol=1e-12)
    la.optimize_prior_precision(n_steps=5)
    assert float(la.prior_precision) != PRIOR
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*edge of the grid")
        la.optimize_prior_precision(method="gridsearch", val_loader=outside, grid_size=5)
    assert bool(torch.isfinite(la(inputs(3))).all())
