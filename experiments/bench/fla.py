"""The kernels of flash-linear-attention on the same device and inputs, for `python -m experiments.bench kernels`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Made = tuple[Callable[[], Any], Callable[[], Any], tuple[Any, list[Any]]]
NEEDED = ("torch", "fla.ops.simple_gla", "fla.ops.gla", "fla.ops.gated_delta_rule")


def implementations() -> dict[str, dict[str, Callable[..., Made]]]:
    """By family and name: a function of inputs, weights and the documents' bounds, which gives a forward pass, one with
    gradients, and what both of them compute.

    Raises ValueError where something is missing.
    """
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        raise ValueError(
            f"--peer fla: {', '.join(missing)} cannot be imported: pip install torch flash-linear-attention, or leave "
            "--peer out"
        )
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--peer fla: torch sees no CUDA device, and the kernels need one: leave --peer out")
    modules = {name.rsplit(".", 1)[1]: importlib.import_module(name) for name in NEEDED[1:]}
    simple, keys, delta = (modules[name] for name in ("simple_gla", "gla", "gated_delta_rule"))
    return {
        "outer, a decay per head": {"fla chunk_simple_gla": _made(simple.chunk_simple_gla, ("q", "k", "v", "g"))},
        "outer, a decay per key": {"fla chunk_gla": _made(keys.chunk_gla, ("q", "k", "v", "g"))},
        "delta, gated": {
            "fla chunk_gated_delta_rule": _made(delta.chunk_gated_delta_rule, ("q", "k", "v", "beta", "g"))
        },
    }


def _made(kernel: Callable[..., Any], names: Sequence[str]) -> Callable[..., Made]:
    """`names`: the kernel's arguments in the order of our inputs."""

    def make(inputs: Sequence[jax.Array], weights: jax.Array, bounds: np.ndarray) -> Made:
        import torch

        tensors = [torch.from_dlpack(x).detach().clone().requires_grad_() for x in inputs]
        weight = torch.from_dlpack(weights)
        options: dict[str, Any] = {"scale": 1.0}
        if len(bounds) > 2:
            options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.long, device=weight.device)

        def forward(grad: bool = False) -> Any:
            with torch.set_grad_enabled(grad):
                out = kernel(**dict(zip(names, tensors, strict=True)), **options)[0]
            torch.cuda.synchronize()
            return out

        def both() -> Any:
            loss = (forward(grad=True).float() * weight).sum()
            gradients = torch.autograd.grad(loss, tensors)
            torch.cuda.synchronize()
            return gradients

        array = lambda tensor: np.asarray(tensor.detach().float().cpu())
        return lambda: _ended(forward()), lambda: _ended(both()), (array(forward()), [array(x) for x in both()])

    return make


def _ended(result: Any) -> np.ndarray:
    """Nothing is left to wait for; what jax's timer is given has to be an array."""
    return np.zeros(())
