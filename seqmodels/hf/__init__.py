"""Models to and from Hugging Face folders: `load_pretrained(directory)`, `save_pretrained(model, directory)`.

To add an architecture, write one file beside this one and put its `Architecture` into `pretrained.ARCHITECTURES`:

1. `read(fields) -> ModelConfig`. Take every entry of config.json that changes what the model computes, through the
   getters of `fields.Fields`, with transformers' own defaults; entries of which only some values are supported through
   `fields.only`. Layers: `architecture.grouped(elements)` makes layer groups of a list of blocks.
2. `write(config) -> dict`, the inverse: the same entries from our config. It need not look for things that it cannot
   say: the result is read back and compared with the config, and an error names the first difference. Fields of a new
   mixer that only initialise or run it belong into `architecture.RUN_AND_START`, those that give a size in one of
   several ways into `architecture.SIZES`.
3. `outer(config)` and `block(steps, config)`, tables of rules (`tables`): which tensor is which parameter, through
   which transform. A mixer's parameters are "0.layer.*", the channel layer's (if `depth` is 2) "1.layer.*", the norms
   before them "0.norm" and "1.norm". Loading raises unless every parameter is filled exactly once.
4. `tests/parity/test_<architecture>.py`: tiny random models of transformers in several configurations.
"""

from seqmodels.hf.pretrained import ARCHITECTURES, Source, load_pretrained, save_pretrained, to_tensors

__all__ = ["ARCHITECTURES", "Source", "load_pretrained", "save_pretrained", "to_tensors"]
