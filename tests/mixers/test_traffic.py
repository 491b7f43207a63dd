"""What travels between devices when time is sharded, read off the compiled program."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqmodels import params
from seqmodels.typing import Context, Segments
from tests.mixers.properties import ATTENTION, CONFIGS, SEQUENTIAL, TIME, WIDTH, subject, tokens
from tests.mixers.test_lengths import FAMILIES

DEVICES = 8
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8, "c64": 8}
COLLECTIVE = re.compile(r"= (\([^)]*\)|\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(")
SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")

# Their state is one number a channel and nothing else, so an element is as many decays again, and a flag.
ELEMENTWISE = {"gated_rnn", "mingru", "minlstm"}
# A delta rule's element is a dense K x K transition beside the K x V memory; here K = V, and little else is carried.
DENSE = {"rwkv7", "deltanet", "kda"}
SHARDED = [name for name in CONFIGS if name not in SEQUENTIAL]


def bytes_received(program: str) -> int:
    """Bytes that the collectives of a program leave on each device (a loop's body once)."""
    total = 0
    for results in COLLECTIVE.findall(program):
        for kind, shape in SHAPE.findall(results):
            total += BYTES[kind] * int(np.prod([int(size) for size in shape.split(",") if size], initial=1))
    return total


def traffic(name: str, length: int, *, gradients: bool) -> int:
    """Of outputs alone, for one row; with their gradient to the tokens where that is asked for."""
    s = subject(name)
    mesh = jax.make_mesh((DEVICES,), (TIME,), axis_types=(AxisType.Auto,))
    along = P(None, TIME)

    def mix(arrays: Any, x: Any, segments: Segments, positions: Any) -> Any:
        return params.merge(s.definition, arrays)(x, None, Context(segments, positions, sequence_axis=TIME))[0]

    sharded = jax.shard_map(mix, mesh=mesh, in_specs=(P(), along, along, along), out_specs=along)

    def run(x: Any, segments: Segments, positions: Any) -> Any:
        forward = lambda x: sharded(s.params, x, segments, positions)
        return jax.vjp(forward, x)[1](x) if gradients else forward(x)

    segments = Segments.whole(1, length, fresh=True)
    program = jax.jit(run).lower(tokens(0, 1, length), segments, segments.positions()[0]).compile().as_text()
    assert program.count("num_partitions=8") == 1
    return bytes_received(program)


def test_bytes_of_a_program() -> None:
    text = """
      %a = f32[8,1,64]{2,1,0} all-gather(%x), channel_id=1
      %b = (s32[4]{0}, pred[2,3]{1,0}) all-gather(%y, %z), channel_id=2
      %c = f32[5]{0} add(%p, %q)
    """
    assert bytes_received(text) == 4 * 8 * 64 + 4 * 4 + 6


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        pytest.param(name, gradients, marks=[] if name == "rg_lru" else pytest.mark.slow)
        for name in SHARDED
        for gradients in ((False, True) if name in FAMILIES else (True,))
    ],
)
def test_a_recurrence_sends_one_element_a_device(name: str, gradients: bool) -> None:
    """What travels does not grow with time, but for attention, whose keys pass around once."""
    short, long = (traffic(name, length, gradients=gradients) for length in (16, 64))
    if name in ATTENTION:
        # a hop sends one device's keys and values, at most one head a query head, with 4 numbers a token to tell them
        a_hop = 4 * (2 * WIDTH + 4) * (64 // DEVICES)
        assert short < long <= (1 + 2 * gradients) * a_hop + 4 * DEVICES
        return
    assert 0 < short == long
    state = sum(np.asarray(leaf[:1]).nbytes for leaf in jax.tree.leaves(subject(name).fresh.state))
    # an element is a state and its decays; the flags and counts of tokens come on top
    element = 2 * state + 1 if name in ELEMENTWISE | DENSE else 1.5 * state
    assert short <= (1 + gradients) * DEVICES * element
