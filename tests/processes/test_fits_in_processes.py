"""Fits of two and three processes are those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "fits.py"
pytestmark = pytest.mark.slow
CASES = [
    "default",
    "few rows",
    "diagonal",
    "held out",
    "same batch",
    "isotropic",
    "Lanczos",
    "kron",
    "full",
    "last layer",
    "subnetwork",
    "uniform",
    "uniform Lanczos",
    "uniform kron",
    "Hessian",
    "empirical Fisher",
    "chosen",
    "poisson",
    "tolerance",
]


def started(size, folder, *mode, timeout=400):
    """What the processes of a group end with, within a time limit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, SCRIPT, str(rank), str(size), str(folder), *mode] for rank in range(size)]
    running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        return [(one.returncode, errors) for one in running for _, errors in [one.communicate(timeout=timeout)]]
    finally:
        for one in running:
            one.kill()


def kept_by(size, folder):
    """What each process of a group found."""
    for code, errors in started(size, folder):
        assert code == 0, errors
    return [torch.load(folder / f"{size}_{rank}.pt") for rank in range(size)]


MESSAGES = {
    "other_weights": "ValueError: Expected weights to be the same in all",
    "other_prior": "ValueError: Expected prior_precision to be the same in all",
    "other_likelihood": "ValueError: Expected likelihood to be the same in all",
    "other_tolerance": "ValueError: Expected tolerance to be the same in all",
    "the_same_stream": "ValueError: Expected a stream of its own in each process; 61 of the 61 samples",
    "other_middle": "ValueError: Expected loaders over the same data set in all",
    "other_data": "ValueError: Expected loaders over the same data set in all",
    "a_shard_as_a_list": "ValueError: Expected loaders over the same data set in all",
    "draws_without_a_generator": "ValueError: shared=True draws in several processes: expected a generator",
    "other_inputs_of_a_shared_prediction": "ValueError: Expected inputs_and_generator to be the same in all",
    "other_options": "ValueError: Expected options to be the same in all",
    "empty_streams": "ValueError: The loader yields no samples; expected at least 2.",
    "other_batches_of_an_iterable": "ValueError: Expected the same batches in all",
    "other_prior_of_a_kl": "ValueError: Expected posterior to be the same in all",
    "other_validation_data": "ValueError: Expected val_loader to be the same in all",
}


@pytest.mark.parametrize("size", [2, 3])
def test_fits_of_several_processes_are_those_of_one(size, tmp_path):
    (alone,), several = kept_by(1, tmp_path), kept_by(size, tmp_path)
    messages = [one.pop("failures") for one in several]
    assert len(alone["everything else"]) == 29
    for name in ("everything else", "everything else, shared")[size == 3 :]:
        for key, expected in alone["everything else"].items():
            assert expected.nan_to_num().abs().max() > 0, key
            torch.testing.assert_close(several[0][name][key], expected, rtol=1e-8, atol=1e-10, equal_nan=True, msg=key)
    for name, first in several[0].items():
        for other in several[1:]:
            for key, value in first.items():
                assert torch.equal(other[name][key].nan_to_num(), value.nan_to_num()), (name, key)
    for name in CASES:
        assert_same(several[0][name], alone[name], name, 1e-6 if "Lanczos" in name else 1e-12)
    # each process yields a part; the sampler repeats samples so that all processes have as many
    for name in ("sampler", "streams"):
        assert_same(several[0][name], alone["diagonal"], name, 1e-9)
    for rank, of_rank in enumerate(messages):
        # a process without samples, and a wrapped model
        assert_same(of_rank.pop("an empty shard"), alone["diagonal"], "an empty shard", 1e-9)
        for name, start in MESSAGES.items():
            assert of_rank[name].startswith(start), of_rank[name]
        waited = "for 0.3 s for other processes" in of_rank["alone_for_a_while"]
        assert waited == (rank != 1), of_rank["alone_for_a_while"]
        assert "the disk is full" in of_rank["an_evaluation_of_one_fails"]
        wrong = of_rank["wrong_arguments_of_one"]
        failed = "ValueError: tolerance" if rank == 1 else "ProcessError: Another process has failed (process 1 of"
        assert wrong.startswith(failed)
        if rank == 1:
            assert of_rank["one_raises"] == "OSError: the disk is full"
        else:
            assert of_rank["one_raises"].startswith("ProcessError: Another process has failed (process 1 of")
            assert "OSError: the disk is full" in of_rank["one_raises"]


def assert_same(found, expected, name, tolerance):
    for key in ("rows", "samples"):
        assert torch.equal(found[key], expected[key]), (name, key)
    for key in ("precision", "magnitudes", "errors", "loss", "variances"):
        close = {"rtol": 0, "atol": tolerance * float(expected[key].abs().max())}
        torch.testing.assert_close(found[key], expected[key], **close, msg=f"{name}, {key}")


def test_a_killed_process_ends_the_others_and_the_fit_goes_on_in_the_next_attempt(tmp_path):
    ended = started(2, tmp_path, "killed", timeout=120)
    assert ended[1][0] == -9
    found = torch.load(tmp_path / "killed_0.pt")
    assert found["ended"] != "none"
    assert found["seconds"] < 60
    for code, errors in started(2, tmp_path, "resumed", timeout=120):
        assert code == 0, errors
    several = [torch.load(tmp_path / f"resumed_{rank}.pt") for rank in range(2)]
    # of 5 and 4 batches, process 1 has scored 2 before it was killed
    assert several[0]["scored"] < 33
    assert several[1]["scored"] == 28 - 14
    (alone,) = kept_by(1, tmp_path)
    for one in several:
        assert_same(one["found"], alone["diagonal"], "resumed", 1e-12)


REFUSED = {
    "pickled": "PicklingError: A posterior whose directions are divided among processes cannot be pickled",
    "other_inputs": "ValueError: Expected inputs to be the same in all 2 processes",
    "gradients": "ValueError: enable_backprop=True is not built for shard_directions=True.",
    "one_shard_only": "ValueError: Expected all shards of a state; none has the directions of parameters [2, 3, 4, 5]",
    "a_shard_as_a_state": "ValueError: The state is one of several shards; expected all of them",
    "last_layer": "ValueError: shard_directions=True is built for whole parameter tensors of more than the last layer",
    "hessian": "ValueError: shard_directions=True is built for whole parameter tensors",
    "sharded_parameters": "ValueError: The model's parameters are divided among processes (DTensor, as of fully_shard)",
    "priors_of_entries": "ValueError: One prior_precision per parameter needs another complement than the one fitted",
}


def test_posteriors_whose_directions_are_divided_are_those_of_one_process(tmp_path):
    found = {}
    # the last one loads the shards of two and three processes
    for size in (1, 2, 3, 1):
        for code, errors in started(size, tmp_path, "sharded"):
            assert code == 0, errors
        found[size] = [torch.load(tmp_path / f"shards_{size}_{rank}.pt") for rank in range(size)]
    whole = found[1][0]
    for size, several in found.items():
        refused = [one.pop("refused") for one in several]
        for name, first in several[0].items():
            expected = whole[name.split(", loaded from")[0]]
            shapes = [one[name].pop("shape").tolist() for one in several if "shape" in one[name]]
            # each process holds some of the entries
            assert not shapes or (len(shapes), sum(p for p, _ in shapes)) == (size, 455)
            for key, value in first.items():
                for other in several:
                    assert torch.equal(other[name][key], value), (name, key)
                close = {"rtol": 0, "atol": 1e-9 * float(expected[key].abs().max())}
                torch.testing.assert_close(value, expected[key], **close, msg=f"{size}, {name}, {key}")
        assert sum("loaded from" in name for name in several[0]) == 7 * {1: 2, 2: 1, 3: 2}[size]
        if size == 2:
            for of_rank in refused:
                for name, start in REFUSED.items():
                    assert of_rank[name].startswith(start), of_rank[name]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_processes_on_gpus_agree_with_one_on_the_cpu(tmp_path):
    for code, errors in started(2, tmp_path, "gpus"):
        assert code == 0, errors
    (alone,) = kept_by(1, tmp_path)
    for rank in range(2):
        for found in torch.load(tmp_path / f"gpu_{rank}.pt").values():
            assert_same(found, alone["diagonal"], "on GPUs", 1e-6)
