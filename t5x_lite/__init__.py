"""t5x_lite carries a language model through its whole life, in JAX.

Importing the package imports nothing else, so that the command line answers at once; import the
module that you need: `from t5x_lite.nn.presets import llama`.
"""

__version__ = "0.1.0"
