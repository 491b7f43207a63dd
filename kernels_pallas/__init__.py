"""Pallas kernels: arrays in, arrays out, one file per operator family with its reference.

For TPUs: `outer.chunk_outer` (a decay per head) and `outer_keys.chunk_outer_keys` (one per key, and RWKV-6's bonus),
`linear.linear_scan` (real and complex), `selective.selective_scan` (Mamba-1), `delta.chunk_delta` and
`delta_keys.chunk_delta_keys`, `exponential.chunk_exponential` and `chunk_sigmoid` (mLSTM). Those for Hopper GPUs are
in `gpu`. Elsewhere XLA forms run, and `method="pallas"` says so where it is asked for. Files in this package import jax
and nothing else of the project.
"""
