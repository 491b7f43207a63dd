"""One of several processes that train the tiny model together: `python -m tests.train.process RANK COUNT PORT WORKDIR`.

It says `step N` as it goes; with the argument `STOP`, the second process sends itself SIGTERM before step 4.
"""

from __future__ import annotations

import os
import signal
import sys

DEVICES = 8


def main(rank: int, count: int, port: str, workdir: str, *rest: str) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // count}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, rank)

    from seqmodels.train import Interrupted, MeshConfig, train
    from tests.train.test_loop import Trouble
    from tests.train.tiny import FULL, loader, tiny_config, tiny_model

    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    batches = Trouble(4, stop) if rank == 1 and "STOP" in rest else loader()
    try:
        result = train(tiny_model(FULL), batches, tiny_config(mesh=MeshConfig(2, 2, 2)), workdir=workdir, quiet=True)
    except Interrupted as stopped:
        print(stopped, flush=True)
        return
    print(f"devices {jax.device_count()} of {jax.process_count()} processes, step {result.step}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
