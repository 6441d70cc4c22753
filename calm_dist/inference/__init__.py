"""Trained models in one process: loading, generation, sampling, decoding."""

from calm_dist.compat.megatron_import import import_megatron

# Before the first module of Megatron-core that one of this package imports.
import_megatron()
