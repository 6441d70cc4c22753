"""Library insides that this package relies on; `tests/unit/test_compat.py` names them.

An upgrade that breaks one fails there first. Megatron-core's shims for CPUs are still in
`parallel.cpu`.
"""
