"""Published ways to choose what is held, each as a plan that leaves as much as another one.

They hold what a part adds to the stream, after its gate, where some of the originals keep what a
module gives before it. Fewer steps is no plan: it is another run (`side_by_side`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ..hooks.hold import parts
from ..hooks.points import HookPoint
from ..measures import Array
from ..model.hooked import HookedDiT
from ..plans.costs import Costs
from ..plans.plan import Plan
from ..sampling.run import Run
from .whole_steps import even_steps, number_of_steps, whole_steps

BISECTIONS = 40


def uniform(model: HookedDiT, times: Sequence[float], budget: float, lines: bool = False) -> Plan:
    """Whole steps held at even distances: FORA (Selvaraju et al. 2024, arXiv 2407.01425); along
    lines, the first order of TaylorSeer (Liu et al. 2025, arXiv 2503.06923). The number of steps is
    the one nearest to the budget, within it or a little above.

    Args:
        model: the opened model.
        times: of the run's steps, in the scheduler's units.
        budget: the share of multiply-accumulates that may be left.
        lines: whether they are held along lines.
    """
    steps = len(times)
    kept = even_steps(steps, number_of_steps(model, steps, budget, nearest=True))
    return whole_steps(model, times, kept, lines)


def at_random(model: HookedDiT, times: Sequence[float], budget: float, seed: int = 0) -> Plan:
    """Cells drawn at random.

    Args:
        model: the opened model.
        times: of the run's steps, in the scheduler's units.
        budget: the share of multiply-accumulates that may be left.
        seed: of the draw.
    """
    costs = Costs.of(model)
    cells = [(*place, s) for place in costs.parts for s in range(1, len(times))]
    mixed = [cells[i] for i in np.random.default_rng(seed).permutation(len(cells))]
    low, high = 0, len(mixed)  # the fewest that are enough
    while low < high:
        middle = (low + high) // 2
        enough = costs.share(mixed[:middle], len(times)) <= budget
        low, high = (low, middle) if enough else (middle + 1, high)
    return Plan.of(model, times, mixed[:low])


def front_and_rear(model: HookedDiT, times: Sequence[float], budget: float) -> Plan:
    """The rear layers held early and the front layers late: Delta-DiT (Chen et al. 2024, arXiv
    2406.01125). Every n-th step is computed, n the fewest for which not all layers must be held.

    Args:
        model: the opened model.
        times: of the run's steps, in the scheduler's units.
        budget: the share of multiply-accumulates that may be left.
    """
    costs, steps, n = Costs.of(model), len(times), model.cfg.n_layers
    found: list[tuple[int, str, int]] = []
    ways = [(every, depth) for every in range(2, steps + 1) for depth in range(1, n)]
    for every, depth in [*ways, *((every, n) for every in range(2, steps + 1))]:
        front, rear = range(depth), range(n - depth, n)
        found = [
            (layer, part, s)
            for layer, part in costs.parts
            for s in range(steps)
            if s % every and layer in (rear if s < steps / 2 else front)
        ]
        if costs.share(found, steps) <= budget:
            break
    return Plan.of(model, times, found)


def pairs(model: HookedDiT, times: Sequence[float], late: bool = False) -> Plan:
    """Every second step of the first 40 % held whole: the structure of the plan that was learned
    for DiT-XL/2 (L2C, Ma et al. 2024, arXiv 2406.01733), whose held cells are nearly all of the
    first 20 of 50 steps. It leaves four fifths, whatever the budget. Late, the same of the last
    40 %, to tell early steps from late ones.

    Args:
        model: the opened model.
        times: of the run's steps, in the scheduler's units.
        late: whether they are of the last 40 %.
    """
    steps = len(times)
    early = range(1, int(0.4 * steps), 2)
    held = [steps - s for s in early] if late else early
    return whole_steps(model, times, [s for s in range(steps) if s not in held])


def similarity(
    run: Run, budget: float, longest: int = 15, apart: Mapping[str, Array] | None = None
) -> Plan:
    """Parts held as long as what they add is like what they added when last computed:
    SmoothCache's criterion (Liu et al. 2024, arXiv 2411.10510). The measure is the L1 distance over
    the L1 norm, a mean over layers and samples; a part of all layers is held together; the
    threshold is the one that leaves the budget.

    Args:
        run: a plain run of samples, which the likeness is measured on.
        budget: the share of multiply-accumulates that may be left.
        longest: for how many steps in a row a part may be held.
        apart: what `unlike` gives of the run, if it is known.
    """
    model, steps, costs = run.model, run.settings.steps, Costs.of(run.model)
    apart = unlike(run, longest) if apart is None else apart
    kinds = list(apart)

    def cells(threshold: float) -> list[tuple[int, str, int]]:
        found = []
        for kind in kinds:
            last = 0
            for step in range(1, steps):
                back = step - last
                if back <= longest and apart[kind][step, back] < threshold:
                    found += [(layer, part, step) for layer, part in costs.parts if part == kind]
                else:
                    last = step
        return found

    low, high = 0.0, max(float(np.nanmax(values)) for values in apart.values()) + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = costs.share(cells(middle), steps) <= budget
        low, high = (low, middle) if enough else (middle, high)
    return Plan.of(model, run.timesteps.tolist(), cells(high), {"threshold": high})


def unlike(run: Run, longest: int) -> dict[str, Array]:
    """Of each part [step, back]: how far what it adds is from what it added `back` steps before, L1
    over L1, a mean over layers and samples; NaN where there is none.

    Args:
        run: of the samples.
        longest: for how many steps back.
    """
    model, steps = run.model, run.settings.steps
    of_layer = [parts(model.names, layer) for layer in range(model.cfg.n_layers)]
    kinds = list(dict.fromkeys(part for each in of_layer for part in each))
    summed = {kind: np.zeros((steps, longest + 1)) for kind in kinds}
    before: deque[dict[str, Tensor]] = deque(maxlen=longest)
    names = [p.name for each in of_layer for places in each.values() for p in places]
    for step in range(steps):
        now: dict[str, Tensor] = {}
        with model.hooks([(names, partial(_keep, now))]):
            run.forward(step)
        for back, then in enumerate(before, start=1):
            for kind, places in ((k, places) for each in of_layer for k, places in each.items()):
                distance = sum((now[p.name] - then[p.name]).abs().mean().item() for p in places)
                norm = sum(now[p.name].abs().mean().item() for p in places)
                summed[kind][step, back] += distance / max(norm, 1e-12)
        before.appendleft(now)
    found = {}
    for kind in kinds:
        number = sum(kind in each for each in of_layer)
        known = np.arange(longest + 1)[None] <= np.arange(steps)[:, None]
        found[kind] = np.where(known, summed[kind] / number, np.nan)
    return found


def _keep(kept: dict[str, Tensor], value: Tensor, hook: HookPoint) -> None:
    kept[hook.name] = value.detach()
