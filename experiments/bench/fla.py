"""Kernels of flash-linear-attention and mamba-ssm on the same device and inputs, for `python -m experiments.bench
kernels --peer fla`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.case import Function

Made = tuple[Callable[[], Any], Callable[[], Any], tuple[Any, list[Any]]]
PACKAGES = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}
SSD_CHUNK = 256  # what layers of Mamba-2 take where nothing else is said


class Peer(NamedTuple):
    """A kernel for a family of ours.

    It takes `inputs(*ours)` as arguments called `names`, in this order, and `options(documents' bounds, the first of
    the inputs)`. Where `inputs` are not ours, `to_ours(*inputs)` makes them so again.
    """

    family: str
    module: str
    function: str
    names: tuple[str, ...]
    options: Callable[[np.ndarray, Any], dict[str, Any]]
    inputs: Function = lambda *ours: ours
    to_ours: Function | None = None

    @property
    def name(self) -> str:
        return f"{self.module.split('.')[0]} {self.function}"

    def made(self, inputs: Sequence[jax.Array], weights: jax.Array, bounds: np.ndarray) -> Made:
        """A forward pass, one with gradients, and what both of them compute."""
        import torch

        kernel = getattr(importlib.import_module(self.module), self.function)
        tensors = [torch.from_dlpack(x).detach().clone().requires_grad_() for x in inputs]
        weight = torch.from_dlpack(weights)
        arguments = dict(zip(self.names, tensors, strict=True)) | self.options(bounds, tensors[0])

        def forward(grad: bool = False) -> Any:
            with torch.set_grad_enabled(grad):
                out = kernel(**arguments)
            torch.cuda.synchronize()
            return out[0] if isinstance(out, tuple) else out  # with a final state, None if not asked for

        def both() -> Any:
            loss = (forward(grad=True).float() * weight).sum()
            gradients = torch.autograd.grad(loss, tensors)
            torch.cuda.synchronize()
            return gradients

        array = lambda tensor: np.asarray(tensor.detach().float().cpu())
        return lambda: _ended(forward()), lambda: _ended(both()), (array(forward()), [array(x) for x in both()])


def ssd_inputs(query: Any, key: Any, value: Any, log_decay: Any) -> tuple[Any, Any, Any, Any]:
    """Mamba-2's C, B, x and dt for a decay per head, before any time is taken: its own layers have them as they are.

    SSD is h = exp(dt A) h + dt B x^T, read by C. With A = -1, dt is -log_decay; what is written is scaled by it, so
    that x is value / dt, and log_decay has to be below zero. Gradients are those of x and dt,
    as layers take them; that of log_decay would be a small difference of numbers 1 / dt times as large.
    """
    dt = -log_decay
    return query, key, jnp.asarray(value / dt[..., None], value.dtype), dt


def ssd_to_ours(c: Any, b: Any, x: Any, dt: Any) -> tuple[Any, Any, Any, Any]:
    return c, b, dt[..., None] * x, -dt


def _fla_options(bounds: np.ndarray, query: Any) -> dict[str, Any]:
    """Queries are not scaled; documents are packed into one row."""
    import torch

    documents = torch.tensor(bounds, dtype=torch.long, device=query.device)
    return {"scale": 1.0} | ({"cu_seqlens": documents} if len(bounds) > 2 else {})


def _ssd_options(bounds: np.ndarray, query: Any) -> dict[str, Any]:
    """A group a head: every head has its own keys and queries."""
    import torch

    batch, _, heads = query.shape[:3]
    numbers = np.tile(np.repeat(np.arange(len(bounds) - 1, dtype=np.int32), np.diff(bounds)), (batch, 1))
    documents = {"seq_idx": torch.tensor(numbers, device=query.device)} if len(bounds) > 2 else {}
    return {"A": -torch.ones(heads, device=query.device), "chunk_size": SSD_CHUNK} | documents


_fla = lambda family, module, function, *names: Peer(family, f"fla.ops.{module}", function, names, _fla_options)
PEERS = (
    _fla("outer, a decay per head", "simple_gla", "chunk_simple_gla", "q", "k", "v", "g"),
    Peer("outer, a decay per head", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined",
         ("C", "B", "x", "dt"), _ssd_options, ssd_inputs, ssd_to_ours),
    Peer("diagonal", "fla.ops.hgrn", "chunk_hgrn", ("g", "x"), lambda bounds, decay: {}),
    _fla("outer, a decay per key", "gla", "chunk_gla", "q", "k", "v", "g"),
    _fla("delta, gated", "gated_delta_rule", "chunk_gated_delta_rule", "q", "k", "v", "beta", "g"),
)  # fmt: skip


def implementations() -> dict[str, dict[str, Peer | str]]:
    """By family and name: a kernel, or why it cannot be imported.

    Raises ValueError where torch, a CUDA device or all of the kernels are missing.
    """
    missing = {}
    for module in dict.fromkeys(("torch", *(peer.module for peer in PEERS))):
        try:
            importlib.import_module(module)
        except Exception as error:  # an import runs whatever a package does
            missing[module] = f"{module} ({error})"
    if "torch" in missing or all(peer.module in missing for peer in PEERS):
        raise ValueError(
            f"--peer fla: {', '.join(missing.values())} cannot be imported: pip install torch "
            f"{' '.join(PACKAGES.values())} (one of the last two will do), or leave --peer out"
        )
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--peer fla: torch sees no CUDA device, and the kernels need one: leave --peer out")
    found: dict[str, dict[str, Peer | str]] = {}
    for peer in PEERS:
        package = PACKAGES[peer.module.split(".")[0]]
        told = f"{missing[peer.module]} cannot be imported: pip install {package}" if peer.module in missing else None
        found.setdefault(peer.family, {})[peer.name] = told or peer
    return found


def _ended(result: Any) -> np.ndarray:
    """Nothing is left to wait for; what jax's timer is given has to be an array."""
    return np.zeros(())
