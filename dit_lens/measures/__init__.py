"""Numbers only: frequency bands, agreement, bootstrap, crossings, commitment, onset.

Belongs here: functions of tensors and arrays, with their sources. Does not: models or runs. Public
of all this is `dit_lens.Bands`; the rest is what `experiments` is built of.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""What the functions in this folder take and give, unless it is a tensor."""
