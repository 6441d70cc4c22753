"""Errors that a user can mend.

Every tool ends with exit code 2 and the message of such an error, without a traceback. A message
names the field or file, the value found and the remedy.
"""


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a command line, a launch."""


class RecipeError(UserError):
    """A recipe field is unknown, of the wrong type, or impossible together with another."""


class DataError(UserError):
    """A corpus, tokenizer or latent store is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another model."""


class LaunchError(UserError):
    """The processes that were launched do not form the world that the recipe needs."""


class PeerLostError(RuntimeError):
    """Another process of the run died or stopped answering; the message names it."""


class HungError(RuntimeError):
    """A rank made no progress for too long; the message, which one rank prints, names it."""


class TrainingDivergedError(RuntimeError):
    """Loss or gradients stayed non-finite; going on would only waste the machines."""


class StoppedError(RuntimeError):
    """A signal asked the run to stop; it wrote a checkpoint and can go on."""


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective of torch failed, as it does when another process died.

    Other errors of a call that reads and communicates are about what it read.
    """
    # gloo has no type of its own; and torch is not needed for errors.
    types = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in types or "gloo/transport" in str(error)
