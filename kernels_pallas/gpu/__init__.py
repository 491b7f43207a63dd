"""Kernels for NVIDIA's Hopper GPUs (H100, H200): the operators of the package, of the same arrays.

Other arguments differ. Chunks have one length each: there is no `chunk`. `chunk_outer`, `chunk_exponential` and
`chunk_sigmoid` have no `save_states`: the walk that makes the gradient of queries makes the states on its way. That of
`selective_scan` is False unless it is given.

`outer.chunk_outer`, `outer_keys.chunk_outer_keys`, `delta.chunk_delta`, `delta_keys.chunk_delta_keys`,
`exponential.chunk_exponential` and `chunk_sigmoid` take bfloat16 and heads of 64, 128 and 256 and share `common`;
`linear.linear_scan` and `selective.selective_scan` go element by element and share `elementwise`. All are written for
Mosaic GPU: copies by the tensor memory accelerator, products of a warp group. None has run on a GPU yet.
"""
