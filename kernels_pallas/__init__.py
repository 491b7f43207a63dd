"""Pallas kernels: arrays in, arrays out, one file per operator family with its reference.

`outer.chunk_outer` (a decay per head), `outer_keys.chunk_outer_keys` (one per key) and `linear.linear_scan` (real and
complex) are for TPUs, those in `gpu` for Hopper GPUs. Other families, and other devices, run XLA forms, and
`method="pallas"` says so where it is asked for. Files in this package import jax and nothing else of the project.
"""
