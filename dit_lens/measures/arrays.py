"""What the functions in this folder take and give, unless it is a tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
