"""What is measured: the gap, commitment by release step, layer profiles, coupling sweeps,
knock-outs.

Belongs here: a question, the runs that answer it, and the dataset and sentence that come out. Does
not: statistics (`measures`), pictures (`report`), single interventions (`patching`).

- `measure_gap`: the whole measurement behind `dit-lens gap`.
- `one_pass`, `release_sweep`: agreement of finished twins by release step, as `Curves`, and
  `commitment_difference` of two of them.
- `attributes`: when each attribute is decided that a function can read off an image.
- `there_and_back`: the same curve for any sampler, deterministic ones and flows too.
- `latents`, `images`, `features`: the `Outcome` that is compared.
- `couplings`: the gap against the strength of the coupling.
- `step_doubling`: whether the gap depends on the number of steps.
- `cause_map`: how far an intervention in each layer and step moves the finished image.
- `compare`: what a change to a model does: the same image, a different one, or a worse one.
- `reuse_plan`: which cells can be held within a budget, as a `Plan`; `side_by_side`: plans beside
  published ways to spend as little.
- `diagnose`: in which layer and at which step a fault arises, and its repair, a `Diagnosis`;
  `diagnose_all`: the same, coarsely, for every fault of many samples.
- `load_edits`: a repair that was saved, a `Repair`, to be run again.
- `knocked_out`: one run without some layers; `knock_outs`, `cumulative`: how far each layer, set of
  layers, or layer in a window of steps moves the gap; `couple_alone`: twins coupled in one layer.
- `interchange`: what the finished image takes from twin A with one band of a layer's stream.
- `shapley`: each layer's share when they act together; `smallest_set`: the fewest that it takes.
"""

from ..plans.plan import Plan
from .ablation import knocked_out
from .attributes import attributes
from .cause_map import cause_map
from .compare import compare
from .couple_alone import couple_alone
from .coupling_sweep import couplings
from .diagnosis.diagnose import Diagnosis, diagnose
from .diagnosis.many import diagnose_all
from .diagnosis.repair import Repair, load_edits
from .gap import measure_gap
from .interchange import interchange
from .knock_outs import cumulative, knock_outs
from .outcomes import Outcome, features, images, latents
from .release import Curves, commitment_difference, one_pass, release_sweep
from .reuse_plan import reuse_plan
from .shapley import shapley
from .side_by_side import side_by_side
from .smallest_set import smallest_set
from .step_doubling import step_doubling
from .there_and_back import there_and_back

__all__ = [
    "Curves",
    "Diagnosis",
    "Outcome",
    "Plan",
    "Repair",
    "cause_map",
    "attributes",
    "commitment_difference",
    "compare",
    "couple_alone",
    "couplings",
    "cumulative",
    "diagnose",
    "diagnose_all",
    "features",
    "images",
    "interchange",
    "knock_outs",
    "knocked_out",
    "latents",
    "load_edits",
    "measure_gap",
    "one_pass",
    "release_sweep",
    "reuse_plan",
    "shapley",
    "side_by_side",
    "smallest_set",
    "step_doubling",
    "there_and_back",
]
