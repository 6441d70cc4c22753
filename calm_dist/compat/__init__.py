"""Library internals that this package relies on; `tests/unit/test_compat.py` lists them.

Every private name and every patch of Megatron-core, DeepSpeed and Streaming is here, so that an
upgrade that breaks one fails first in that test.
"""
