"""Kernels for NVIDIA's Hopper GPUs (H100, H200): the operators of the package, with the same arguments.

`outer.chunk_outer`, `outer_keys.chunk_outer_keys`, `delta.chunk_delta`, `delta_keys.chunk_delta_keys`,
`exponential.chunk_exponential` and `chunk_sigmoid` take bfloat16 and heads of 64, 128 and 256 and share `common`;
`linear.linear_scan` and `selective.selective_scan` go element by element and share `elementwise`. All are written for
Mosaic GPU: copies by the tensor memory accelerator, products of a warp group. None has run on a GPU yet.
"""
