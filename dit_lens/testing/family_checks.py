"""The contract of a family, on its small models: every check raises AssertionError with what is
wrong.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..families import Condition, Family, flat, small_inputs
from ..families.upstream import methods
from ..hooks.hold import parts, stack
from ..hooks.names import Addition, additions, layer_of, site_of
from ..hooks.points import HookPoint, Observer
from ..model.hooked import HookedDiT
from ..plans.plan import Plan
from ..plans.runner import reuse
from ..tracing.trace import load_trace, trace
from ..twinning.coupling import coupled

VARIANTS = (0, 1, 2)
TEXT_AXES = ("text_token", "text_query", "text_key")


@dataclass
class Case:
    """One small model, opened, on a device, with a batch of two."""

    family: Family
    variant: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        plain, condition = self.family.small(self.variant)
        self.plain, self.condition = plain.to(self.device), Condition(self._moved(condition))
        self.inputs = small_inputs(self.family, self.plain, self.condition)
        self.x = self.family.latents(self.plain, self.inputs)
        self.t = torch.tensor([700.0, 31.0], device=self.device)
        self.model = HookedDiT(copy.deepcopy(self.plain))
        self.cfg = self.model.cfg

    def _moved(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """These arguments with their tensors on the device."""
        return {name: self._there(value) for name, value in arguments.items()}

    def _there(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._there, value))
        return self._moved(value) if isinstance(value, dict) else value

    def ask(self, model: Any = None) -> Tensor:
        """What the transformer (this one, or the opened one) answers."""
        with torch.no_grad():
            return flat(self.family.call(model or self.model.transformer, self.inputs))

    def ask_of(self, inputs: dict[str, Any]) -> Tensor:
        """What the opened transformer answers to these arguments."""
        with torch.no_grad():
            return flat(self.family.call(self.model.transformer, inputs))

    def look(self, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The answer, and the activations of these names in the order in which they came."""
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, point: HookPoint) -> None:
            assert point.name not in kept, f"{point.name} fires twice in one pass"
            kept[point.name] = value.clone()

        handles = [self.model.instrumentation.attach(name, Observer(keep)) for name in names]
        try:
            return self.ask(), kept
        finally:
            for handle in handles:
                handle.remove()

    def seen(self) -> dict[str, Tensor]:
        """Every activation of one pass, by name, in the order in which they came."""
        return self.look(self.model.names)[1]

    def additions(self) -> list[Addition]:
        """What the layers add to the image's stream and to the text's."""
        return [found for stream in ("", "text.") for found in additions(self.model.names, stream)]

    def edited(self, name: str, fn: Callable[[Tensor], Tensor]) -> Tensor:
        with self.model.hooks([(name, lambda a, hook: fn(a))]):
            return self.ask()


def same_output(case: Case) -> None:
    """the output is bit for bit the unopened model's: idle, with everything observed, and after
    remove()
    """
    want = case.ask(case.plain)
    assert want.isfinite().all(), "the small model's output is not finite"
    assert torch.equal(want, case.ask()), "opened, with nobody listening, the output is another"
    with case.model.hooks([(None, lambda _, hook: None)]):
        assert torch.equal(want, case.ask()), "with hooks that return None the output is another"
        with torch.enable_grad():
            graded = flat(case.family.call(case.model.transformer, case.inputs))
        assert torch.equal(want, graded), (
            "with hooks that return None, and gradients on, the output is another"
        )
    with torch.no_grad():
        output = case.model(case.x, case.t, case.condition)
    direct = case.family.output(case.plain, case.family.call(case.plain, case.inputs), case.inputs)
    assert torch.equal(output, direct), "model(x, t, y) gives another output than the transformer"
    assert output.shape[0] == 2 and output.shape[-2:] == case.x.shape[-2:], (
        f"model(x, t, y) has shape {list(output.shape)}"
    )
    case.model.remove()
    left = [name for name, m in case.model.transformer.named_modules() if "forward" in m.__dict__]
    assert not left, f"remove() leaves a forward on {left[0]!r}"
    assert torch.equal(want, case.ask()), "after remove() the output is another"


def names_in_order(case: Case) -> None:
    """every name fires once, in the order of model.names"""
    order = list(case.seen())
    silent = [n for n in case.model.names if n not in order]
    assert not silent, f"{silent[0]} is named and never fires"
    for got, named in zip(order, case.model.names, strict=True):
        assert got == named, f"{got} fires where {named} is named"


def shapes_as_named(case: Case) -> None:
    """every activation has the axes that its name promises, as long as the model's sizes say"""
    cfg, seen, sites = case.cfg, case.seen(), case.model.sites
    for name, value in seen.items():
        assert value.ndim == len(sites[name]), (
            f"{name} has shape {list(value.shape)} and is said to have the axes "
            f"{', '.join(sites[name])}"
        )
    of_text = (
        v.shape[sites[n].index(axis)]
        for n, v in seen.items()
        for axis in TEXT_AXES
        if axis in sites[n]
    )
    sizes = cfg.axis_sizes(batch=2, text=next(of_text, None))
    for name, value in seen.items():
        for axis, size in zip(sites[name], value.shape, strict=True):
            assert axis in sizes, f"{name} has the axis {axis}, and cfg.axis_sizes lacks it"
            assert size == sizes[axis], (
                f"{name} has shape {list(value.shape)}; {axis} should be {sizes[axis]}"
            )
    required = {"hook_embed", "hook_sample", "final.hook_out"}
    required |= {f"blocks.{i}.hook_resid_{w}" for i in range(cfg.n_layers) for w in ("pre", "post")}
    absent = sorted(required - set(case.model.names))
    assert not absent, f"there is no {absent[0]}"


def adds_up(case: Case) -> None:
    """resid_pre + attn_out == resid_mid, resid_mid + mlp_out == resid_post, ..., bit for bit"""
    seen, found = case.seen(), 0
    for _, before, added, after in case.additions():
        total = seen[before]
        for name in added:
            total = total + seen[name]
        assert torch.equal(total, seen[after]), f"{before} + {' + '.join(added)} is not {after}"
        found += 1
    assert found >= case.cfg.n_layers, (
        f"only {found} additions are named in {case.cfg.n_layers} layers"
    )


def layers_add_what_is_named(case: Case) -> None:
    """what a layer adds is all named: with it zeroed, every stream leaves the layer as it came"""
    for stream in ("", "text."):
        layers: dict[int, list[Addition]] = {}
        for found in additions(case.model.names, stream):
            layers.setdefault(found.layer, []).append(found)
        for layer, chain in layers.items():
            before, after = (f"blocks.{layer}.{stream}hook_resid_{end}" for end in ("pre", "post"))
            assert (chain[0].before, chain[-1].after) == (before, after), (
                f"the additions of layer {layer} lead from {chain[0].before} to {chain[-1].after}"
            )
            added = [name for each in chain for name in each.added]
            with case.model.hooks([(added, lambda a, hook: torch.zeros_like(a))]):
                _, seen = case.look([before, after])
            assert torch.equal(seen[before], seen[after]), (
                f"with {' and '.join(added)} zeroed, {after} is not {before}"
            )


def edits_reach_the_stream(case: Case) -> None:
    """an edit of the stream changes the stream itself, and every edit reaches the output"""
    plain, seen = case.ask(), case.seen()
    last = max(layer_of(n) or 0 for n in case.model.names)
    for _, before, added, after in case.additions():
        shift = torch.randn(seen[before].shape[-1], generator=torch.Generator().manual_seed(1)).to(
            seen[before]
        )
        edits: Any = [(before, lambda a, hook, shift=shift: a + shift)]
        names = [before, *added, after]
        with case.model.hooks(edits):
            _, cache = case.look(names)
        total = cache[before]
        for name in added:
            total = total + cache[name]
        assert torch.equal(cache[before], seen[before] + shift), (
            f"hooks after an edit at {before} see the old value"
        )
        assert torch.equal(total, cache[after]), f"an edit at {before} does not reach {after}"
    sites: dict[str, list[str]] = {}
    for name in case.model.names:
        sites.setdefault(site_of(name), []).append(name)
    idle = []
    for names in sites.values():
        # the same site of two layers at a time, the one in the first item, the other in the second
        for i in range(0, len(names), 2):
            first, second = names[i], names[i : i + 2][-1]
            with case.model.hooks([(first, _scrambled_in(0)), (second, _scrambled_in(1))]):
                changed = case.ask() != plain
            reached = changed.flatten(1).any(1).tolist()
            idle += [name for name, ok in zip((first, second), reached, strict=True) if not ok]
    # a text stream may end with the last block
    idle = [name for name in idle if "text" not in site_of(name) or layer_of(name) != last]
    assert not idle, f"an edit at {idle[0]} does not reach the output"
    for names in sites.values():
        with case.model.hooks([(names, lambda _, hook: None)]):
            assert torch.equal(case.ask(), plain), (
                f"hooks at {names[0]} and its like that return None change the output"
            )


def _scrambled_in(item: int) -> Callable[[Tensor, HookPoint], Tensor]:
    """An edit that makes something else of one item, and leaves the others as they are."""

    def scramble(a: Tensor, _: HookPoint) -> Tensor:
        own = a[item]
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(3)).to(a)
        a[item] = torch.where(own.isfinite(), own, torch.zeros_like(own)) * 0.3 + noise
        return a

    return scramble


def attention_is_what_it_says(case: Case) -> None:
    """patterns are softmax of scores and sum to 1, and the heads' results sum to the attention's
    output
    """
    seen = case.seen()
    for name, pattern in seen.items():
        if not name.endswith("hook_pattern"):
            continue
        prefix = name.removesuffix("hook_pattern")
        assert torch.allclose(pattern.sum(-1), torch.ones_like(pattern[..., 0]), atol=1e-5), (
            f"the rows of {name} do not sum to 1"
        )
        scores = seen[f"{prefix}hook_attn_scores"]
        assert torch.allclose(scores.softmax(-1), pattern, atol=1e-5), (
            f"{name} is not the softmax of its scores"
        )
        same = case.edited(name, lambda a: a.clone())
        assert torch.allclose(same, case.ask(), atol=1e-4), (
            f"with the pattern itself put in at {name} the output is another"
        )
    for name, result in seen.items():
        if name.endswith("hook_result"):
            out = seen[name.replace("hook_result", "hook_out")]
            rest = out - result.sum(2)  # the bias: the same at every token of every item
            assert torch.allclose(rest, rest[:1, :1].expand_as(rest), atol=1e-4), (
                f"{name} summed over heads is not the output"
            )


def reading_is_recording(case: Case) -> None:
    """what a trace recomputes is bit for bit what recording gives, edits included"""
    with trace(case.model, names=None) as lazy:
        lazy.edit("blocks.0.hook_resid_post", lambda a, hook: a * 1.5)
        case.ask()
    with trace(case.model, names=lambda _: True) as eager:
        eager.edit("blocks.0.hook_resid_post", lambda a, hook: a * 1.5)
        case.ask()
    # one site at a time, of all layers, as users read: nothing else is computed for another hook
    for site in dict.fromkeys(site_of(name) for name in case.model.names):
        names = [name for name in case.model.names if site_of(name) == site]
        for name, value in lazy.get(names).items():
            assert torch.equal(value, eager[name]), f"{name}, recomputed, is not what was recorded"
    with tempfile.TemporaryDirectory() as folder:
        with trace(case.model, names="resid_post") as t:
            case.ask()
        again = load_trace(t.save(f"{folder}/trace.safetensors"), case.model)
        assert torch.equal(again["resid_post", 0], t["resid_post", 0]), (
            "a trace, saved and loaded, reads another value"
        )
        assert torch.equal(again["resid_pre", 0], t["resid_pre", 0]), (
            "a trace, saved and loaded, recomputes another value"
        )


def holds_what_was_added(case: Case) -> None:
    """a part of a block, or the whole of it, that is held adds what it added a step before, to
    every stream; and reading that again is recording
    """
    names, n = case.model.names, case.cfg.n_layers
    second = case.family.inputs(case.model.transformer, case.x * 0.5, case.t, case.condition)
    for layer in (0, n - 1):
        sites = {f"blocks.{layer}.{part}": places for part, places in parts(names, layer).items()}
        sites[f"blocks.{layer}"] = stack(names, layer, layer + 1)
        assert sites[f"blocks.{layer}"], f"block {layer} adds to no stream"
        for site, places in sites.items():
            read = [name for place in places for name in place if name]
            seen = []
            for recorded in (read, None):
                with trace(case.model, names=recorded) as t, torch.no_grad():
                    t.hold(site, [1])
                    for inputs in (case.inputs, second):
                        case.family.call(case.model.transformer, inputs)
                seen.append(t.get(read))
            for place in places:
                values = [at[place.name].double() for at in seen]
                assert torch.equal(*values), f"a held {place.name} is not read as it was recorded"
                if place.entered:
                    values = [values[0] - seen[0][place.entered].double()]
                off = float((values[0][1] - values[0][0]).abs().max())
                assert off <= (1e-4 if place.entered else 0.0), (
                    f"with {site!r} held, what is added at {place.name} is off by {off:.2g}"
                )


def plans_leave_out(case: Case) -> None:
    """under a plan the modules that compute held parts, or whole held blocks, do not run, and the
    answer is that of a hold
    """
    names, n = case.model.names, case.cfg.n_layers
    second = case.family.inputs(case.model.transformer, case.x * 0.5, case.t, case.condition)
    whole = [(n - 1, part) for part in parts(names, n - 1)]
    single = [(0, part) for part in parts(names, 0)][:1]
    blocks = case.family.blocks(case.model.transformer)
    for held in (single, whole, single + whole):
        places = [f"blocks.{layer}.{part}" for layer, part in held]
        with trace(case.model) as t:
            t.hold(places, [1])
            case.ask_of(case.inputs)
            want = case.ask_of(second)
        cells = [(layer, part, 1) for layer, part in held]
        one = _item(case.condition)
        plan = Plan.of(case.model, [float(case.t[0])] * 2, cells, y=one)
        leaves = [
            module
            for layer, part in held
            for module in _computing(case, blocks[layer], part, held is not single)
        ]
        with reuse(case.model, plan), _LinearUses(leaves) as uses:
            case.ask_of(case.inputs)
            first = len(uses.ran)
            found = case.ask_of(second)
        # tokens that are neither image nor text are not held
        same = torch.equal(found, want) or (case.family.pads and bool(found.isfinite().all()))
        assert same, f"with {places} held, a plan's answer is not a hold's"
        assert first and len(uses.ran) == first, (
            f"with {places} held, their modules run all the same"
        )
        assert plan.macs < 1, f"{places} are said to cost nothing"
    assert not case.model.instrumentation.busy, "a plan leaves listeners behind"


class _LinearUses(TorchFunctionMode):
    """Each linear layer of these as often as its weight is used in the `with` block; a module that
    is called and computes nothing does not count.
    """

    def __init__(self, modules: list[Any]) -> None:
        super().__init__()
        self.of = {id(m.weight): m for m in modules}
        self.ran: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran += [self.of[id(a)] for a in args if id(a) in self.of]
        return func(*args, **(kwargs or {}))


def _computing(case: Case, block: Any, part: str, whole: bool) -> list[Any]:
    """The leaves that compute a part, or, of a whole block, some that compute it."""
    children = [getattr(block, name, None) for name in case.family.computes.get(part, ())]
    found = [child for child in children if child is not None] or [block] * whole
    return [m for child in found for m in child.modules() if isinstance(m, torch.nn.Linear)]


def twins_couple(case: Case) -> None:
    """twins coupled with g = 0 are bit for bit the plain model, with g > 0 they are not, and equal
    twins stay as they are
    """
    plain = case.ask()
    with coupled(case.model, 0.0):
        assert torch.equal(case.ask(), plain), "coupled with g = 0 the output is another"
    with coupled(case.model, 0.5):
        assert not torch.equal(case.ask(), plain), "coupled with g = 0.5 nothing changes"
        with trace(case.model) as t:
            changed = case.ask()
    assert torch.allclose(t["hook_sample"][0], changed, atol=1e-6), (
        "a coupled pass is not recomputed with its coupling"
    )
    alike = Case(case.family, case.variant, case.device)
    one = alike.family.stack([_item(alike.condition)] * 2)
    alike.inputs = case.family.inputs(
        alike.plain,
        alike.x[:1].repeat(2, *[1] * (alike.x.ndim - 1)),
        torch.full_like(case.t, 500.0),
        one,
    )
    want = alike.ask()
    with coupled(alike.model, 0.7):
        assert torch.allclose(alike.ask(), want, atol=1e-4), (
            "equal twins are changed by their coupling"
        )


def _item(condition: Condition) -> Condition:
    """The first item of a condition for two."""

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, (Tensor, list)) and len(value) == 2 else value

    return Condition({k: first(v) for k, v in condition.items()})


def lens_reads_the_last_stream(case: Case) -> None:
    """the last layer's stream through model.unembed is the model's output, also in the middle of a
    pass
    """
    with torch.no_grad():
        output, cache = case.model.run_with_cache(
            case.x, case.t, case.condition, names_filter="resid_post"
        )
        got = case.model.unembed(cache["resid_post", -1], case.t, case.condition)
    assert torch.equal(got, output), "the last stream, read by the last layer, is not the output"
    inside: list[Tensor] = []

    def look(value: Tensor, point: HookPoint) -> None:
        inside.append(case.model.unembed(value, case.t, case.condition))

    handle = case.model.instrumentation.attach(
        f"blocks.{case.cfg.n_layers - 1}.hook_resid_post", Observer(look)
    )
    with torch.no_grad():
        again = case.model(case.x, case.t, case.condition)
    handle.remove()
    assert torch.equal(inside[0], output) and torch.equal(again, output), (
        "unembed in the middle of a pass disturbs it"
    )


def parts_of_a_pass(case: Case) -> None:
    """a pass can stop before any layer, and start at any where the stream is all that a block is
    given
    """
    with torch.no_grad():
        output, cache = case.model.run_with_cache(
            case.x, case.t, case.condition, names_filter="resid_pre"
        )
        for layer in range(case.cfg.n_layers):
            stream = case.model(case.x, case.t, case.condition, stop_at_layer=layer)
            assert torch.equal(stream, cache["resid_pre", layer]), (
                f"stop_at_layer={layer} is not resid_pre of {layer}"
            )
            if case.cfg.restartable:
                rest = case.model(stream, case.t, case.condition, start_at_layer=layer)
                assert torch.equal(rest, output), (
                    f"from the stream before layer {layer} on, the output is another"
                )


def copies_are_independent(case: Case) -> None:
    """a deep copy and a pickle of the opened model work, with hook points of their own"""
    want = case.ask()
    for copied in (
        copy.deepcopy(case.model.transformer),
        pickle.loads(pickle.dumps(case.model.transformer)),
    ):
        assert torch.equal(case.ask(copied), want), "a copy's output is another"
        theirs = HookedDiT(copied)
        assert theirs.instrumentation is not case.model.instrumentation, (
            "a copy shares the original's hook points"
        )
        with theirs.hooks([("resid_post", lambda a, hook: a * 0)]):
            assert torch.equal(case.ask(), want), "a hook on a copy acts on the original"
            assert not torch.equal(case.ask(copied), want), "a hook on a copy does not act on it"


def speaks_its_language(case: Case) -> None:
    """latents, timesteps and condition, taken from the transformer's arguments, give the same
    arguments again
    """
    inputs, family, model = case.inputs, case.family, case.plain
    x, t = family.latents(model, inputs), family.timesteps(model, inputs)
    assert torch.allclose(t.float(), case.t, rtol=1e-4), (
        f"the timesteps {case.t.tolist()} come back as {t.tolist()}"
    )
    rest = Condition({k: v for k, v in inputs.items() if k not in (family.x_name, family.t_name)})
    again = family.inputs(model, x, t, rest)
    assert again.keys() == inputs.keys(), (
        f"arguments come and go: {sorted(again.keys() ^ inputs.keys())}"
    )
    for name in (family.x_name, family.t_name):
        # a GPU divides by 1000 as it multiplies by 0.001
        off = 0.0 if name == family.x_name or x.device.type == "cpu" else 1e-6
        same = torch.allclose(flat(again[name]), flat(inputs[name]), rtol=off, atol=0)
        assert same, f"{name} comes back as another"
    assert tuple(x.shape[1:]) == case.cfg.latent_shape, (
        f"the latents have shape {list(x.shape)}; expected {case.cfg.latent_shape}"
    )
    assert tuple(family.grid(model, inputs)) == case.cfg.grid, (
        f"the grid is {family.grid(model, inputs)}; expected {case.cfg.grid}"
    )


def sources_are_noted(case: Case) -> None:
    """the diffusers methods that the forwards repeat are the ones they were written for"""
    now = methods([forward for forward, _ in case.model.instrumentation.replaced])
    noted = case.family.written_for
    missing = {k: v for k, v in now.items() if noted.get(k) != v}
    assert not missing, f"written_for should hold {missing}"


def reaches_backward(case: Case) -> None:
    """gradients flow to every stream point, and a backward hook sees them"""
    seen: list[str] = []
    names = [
        n
        for n in case.model.names
        if n.endswith(("hook_resid_pre", "hook_pattern", "hook_z")) and "text" not in n
    ]
    with (
        case.model.hooks(bwd_hooks=[(names, lambda _, hook: seen.append(hook.name))]),
        torch.enable_grad(),
    ):
        flat(case.family.call(case.model.transformer, case.inputs)).sum().backward()
    assert sorted(seen) == sorted(names), (
        f"no gradient arrives at {sorted(set(names) - set(seen))[:1]}"
    )


CHECKS: tuple[Callable[[Case], None], ...] = (
    same_output,
    names_in_order,
    shapes_as_named,
    adds_up,
    layers_add_what_is_named,
    edits_reach_the_stream,
    attention_is_what_it_says,
    reading_is_recording,
    holds_what_was_added,
    plans_leave_out,
    twins_couple,
    lens_reads_the_last_stream,
    parts_of_a_pass,
    copies_are_independent,
    speaks_its_language,
    sources_are_noted,
    reaches_backward,
)
