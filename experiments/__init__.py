"""Commands and presets: `python -m experiments.train PRESET`, `python -m experiments.generate RUN_DIR`."""
