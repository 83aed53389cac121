"""What type checkers and editors see of `dit_lens`; at run time each name is imported on first use.

tests/test_surface.py holds this file and `__init__.py` to the same names, tests/typing/ to the
right types.
"""

from . import errors as errors
from . import experiments as experiments
from . import families as families
from . import groundtruth as groundtruth
from . import measures as measures
from . import patching as patching
from . import probes as probes
from . import testing as testing
from .bridges.nnsight import to_nnsight as to_nnsight
from .bridges.transformer_lens import to_transformer_lens as to_transformer_lens
from .errors import DitLensError as DitLensError
from .families.adapter import Adapter as Adapter
from .hooks.cache import ActivationCache as ActivationCache
from .hooks.names import UnknownName as UnknownName
from .measures.bands import Bands as Bands
from .model.hooked import HookedDiT as HookedDiT
from .model.loading import load as load
from .model.witness import NotReproduced as NotReproduced
from .plans.runner import reuse as reuse
from .report.stored import load_result as load_result
from .sampling.run import Run as Run
from .sampling.sample import sample as sample
from .tracing.activations import Activations as Activations
from .tracing.probe import Probe as Probe
from .tracing.recording import record as record
from .tracing.series import Series as Series
from .tracing.site import Site as Site
from .tracing.trace import Trace as Trace
from .tracing.trace import load_trace as load_trace
from .tracing.trace import trace as trace
from .twinning.twins import Twins as Twins
from .twinning.twins import twins as twins

__version__: str
