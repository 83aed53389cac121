"""Numbers only: frequency bands, agreement, bootstrap, crossings, commitment, onset.

Belongs here: functions of tensors and arrays, with their sources. Does not: models or runs.
"""

from .commitment import agreement, curve

__all__ = ["agreement", "curve"]
