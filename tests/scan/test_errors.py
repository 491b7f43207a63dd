"""What does not fit is answered with the shapes, or the names, and the way out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.scan import scan, sharded_scan, step
from seqmodels.scan.auto import choose
from tests.scan.examples import AFFINE

INPUTS = AFFINE.inputs(np.random.default_rng(0), 6)
CONCATENATE = AFFINE.recurrence._replace(associative=False, act=None, initial=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "parallel"}, "unknown method 'parallel': choose one of auto, sequential, associative, chunked"),
        ({"method": "pallas"}, "belongs to the operator families"),
        ({"method": "tree"}, "use 'associative' or 'chunked'"),
        ({"reset": np.zeros(5, bool)}, r"reset must be bool\[6\].*bool\[5\]"),
        ({"valid": np.ones(6)}, r"valid must be bool\[6\].*float"),
        ({"chunk": 0}, "chunk is a number of steps of at least 1, not 0"),
        ({"state": jnp.zeros(4)}, r"float32\[4\]"),
        ({"state": (jnp.zeros(3),)}, "not built like the initial one"),
        ({"state": jnp.zeros((2, 3))}, r"not shaped like the initial one.*jax\.vmap"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan(AFFINE.recurrence, INPUTS, **arguments)


def test_inputs_need_one_time_axis() -> None:
    with pytest.raises(ValueError, match=r"same leading time axis.*float32\[5,3\]|same leading time axis"):
        scan(AFFINE.recurrence, {**INPUTS, "gate": INPUTS["gate"][:5]})
    with pytest.raises(ValueError, match="at least 1"):
        scan(AFFINE.recurrence, {k: v[:0] for k, v in INPUTS.items()})
    with pytest.raises(TypeError, match=r"seqmodels\.Recurrence, not tuple"):
        scan(tuple(AFFINE.recurrence), INPUTS)


def test_an_operator_that_is_not_associative_runs_only_as_a_tree() -> None:
    for method in ("sequential", "associative", "chunked"):
        with pytest.raises(ValueError, match="not associative: use method='tree'"):
            scan(CONCATENATE, INPUTS, method=method)
    with pytest.raises(ValueError, match="not associative: shard the batch"):
        sharded_scan(CONCATENATE, INPUTS, axis_name="time")
    with pytest.raises(ValueError, match=r"Counter, not float32\[3\]"):
        step(CONCATENATE, {k: v[0] for k, v in INPUTS.items()}, jnp.zeros(3))


def test_an_unknown_start_is_asked_for() -> None:
    with pytest.raises(ValueError, match="pass state=, or give the recurrence an `initial`"):
        scan(AFFINE.recurrence._replace(initial=None), INPUTS)


def test_shapes_that_change_over_a_step_are_shown() -> None:
    grows = AFFINE.recurrence._replace(act=lambda e, s: jnp.concatenate([s, e[1]]))
    with pytest.raises(ValueError, match=r"float32\[3\] into float32\[6\]"):
        scan(grows, INPUTS)
    with pytest.raises(ValueError, match=r"combine turns elements .* structure and shapes must stay"):
        scan(AFFINE.recurrence._replace(combine=lambda a, b: (a[0], a[1][:1])), INPUTS, method="associative")


def test_padding_reaches_fold_and_emit_only_through_neutral() -> None:
    folds = AFFINE.recurrence._replace(fold=lambda xs, reset: AFFINE.recurrence.elements(xs))
    with pytest.raises(ValueError, match="without `neutral`"):
        scan(folds, INPUTS, valid=np.ones(6, bool))


def test_auto_follows_its_table() -> None:
    assert choose(matmul_form=True, length=1, platform="cpu") == "sequential"
    assert choose(matmul_form=True, length=512, platform="cpu") == "chunked"
    assert choose(matmul_form=True, length=512, platform="cpu", family="diagonal") == "sequential"
    assert choose(matmul_form=False, length=512, platform="cpu") == "sequential"
    assert choose(matmul_form=False, length=512, platform="tpu") == "chunked"
    assert choose(matmul_form=False, length=64, platform="gpu") == "associative"
