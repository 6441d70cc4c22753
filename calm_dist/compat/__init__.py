"""Library insides that this package relies on; `tests/unit/test_compat.py` names them.

Every private name and every patch of Megatron-core, DeepSpeed and Streaming is here, so that an
upgrade that breaks one fails in that test first.
"""
