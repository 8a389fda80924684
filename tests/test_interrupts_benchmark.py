"""Small runs of the interrupt and thread experiments; the numbers of the documentation are from large ones."""

import pytest

from benchmarks.interrupts import KINDS, Cost, interrupt_once, interrupts, two_fits

EARLY = Cost(seconds=0.05, exchanges=60, contexts=400)


@pytest.mark.parametrize("operation", ["fit", "predict", "newton_step", "DebiasedNewton.step"])
def test_an_exchange_of_parameters_that_is_interrupted_is_undone(operation: str) -> None:
    interrupted, found = interrupt_once(operation, "exchange", EARLY, seed=3)
    assert interrupted
    assert found == []


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_fit_that_is_interrupted_leaves_everything_as_found(kind: str) -> None:
    interrupted, found = interrupt_once("fit", kind, EARLY, seed=4)
    assert interrupted
    assert found == []


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_two_fits_at_once_leave_everything_as_found(shared: bool) -> None:
    found, errors = two_fits(shared=shared, seed=2)
    assert found == []
    # the second waits for another model; the same one it refuses, unless the first is done already
    assert len(errors) <= shared
    assert all("Another thread uses this model" in error for error in errors)


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.slow
def test_random_interrupts_of_every_operation_leave_everything_as_found() -> None:
    for operation, kind, _, found in interrupts(40, seed=8):
        assert found == [], (operation, kind)
