"""What is measured: the gap, commitment by release step, layer profiles, coupling sweeps,
knock-outs.

Belongs here: a question, the runs that answer it, and the dataset and sentence that come out. Does
not: statistics (`measures`), pictures (`report`), single interventions (`patching`).

- `measure_gap`: the whole measurement behind `dit-lens gap`.
- `one_pass`, `release_sweep`: agreement of finished twins by release step, as `Curves`, and
  `commitment_difference` of two of them.
- `latents`, `images`, `features`: the `Outcome` that is compared.
- `couplings`: the gap against the strength of the coupling.
- `step_doubling`: whether the gap depends on the number of steps.
- `cause_map`: how far an intervention in each layer and step moves the finished image.
- `reuse_plan`: which cells can be held within a budget, as a `Plan`.
- `knock_outs`, `couple_alone`: how far each layer moves the gap; `knocked_out`: one run without
  some layers.
"""

from ..plans.plan import Plan
from .cause_map import cause_map
from .coupling_sweep import couplings
from .gap import measure_gap
from .knock_outs import couple_alone, knock_outs, knocked_out
from .outcomes import Outcome, features, images, latents
from .release import Curves, commitment_difference, one_pass, release_sweep
from .reuse_plan import reuse_plan
from .step_doubling import step_doubling

__all__ = [
    "Curves",
    "Outcome",
    "Plan",
    "cause_map",
    "commitment_difference",
    "couple_alone",
    "couplings",
    "features",
    "images",
    "knock_outs",
    "knocked_out",
    "latents",
    "measure_gap",
    "one_pass",
    "release_sweep",
    "reuse_plan",
    "step_doubling",
]
