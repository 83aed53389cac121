"""Numbers only: frequency bands, agreement, bootstrap, crossings, commitment, onset.

Belongs here: functions of tensors and arrays, with their sources. Does not: models or runs.
"""

from .agreement import Agreement, agreement, curve
from .arrays import Array
from .commitment import fit_commitment
from .crossing import half_crossing
from .estimate import Estimate
from .onset import Onset, onset

__all__ = [
    "Agreement",
    "Array",
    "Estimate",
    "Onset",
    "agreement",
    "curve",
    "fit_commitment",
    "half_crossing",
    "onset",
]
