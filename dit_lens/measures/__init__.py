"""Numbers only: frequency bands, agreement, bootstrap, crossings, commitment, onset.

Belongs here: functions of tensors and arrays, with their sources. Does not: models or runs.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""What the functions in this folder take and give, unless it is a tensor."""

from .agreement import Agreement, agreement, curve  # noqa: E402 (they need Array)
from .commitment import fit_commitment  # noqa: E402
from .crossing import half_crossing  # noqa: E402
from .estimate import Estimate  # noqa: E402
from .onset import Onset, onset  # noqa: E402

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
