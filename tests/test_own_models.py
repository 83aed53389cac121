"""Transformers of one's own, opened by the paths of their modules: what is read and changed is what
torch's module hooks read and change, and an adapter that does not fit is refused.
"""

import copy
import dataclasses
import pickle
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from small_layouts import UViT
from torch import nn

import dit_lens
from dit_lens import Adapter, HookedDiT
from dit_lens.errors import InvalidState, InvalidType, InvalidValue
from dit_lens.experiments import Plan, cause_map, diagnose, measure_gap, reuse_plan
from dit_lens.families import alive

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from own_sit import SiT  # noqa: E402 (an example)

SIT = Adapter((1, 16, 16), labels=10, time=(1.0, 0.0), output=torch.neg)
X, T, Y = torch.randn(2, 1, 16, 16), torch.tensor([0.3, 0.9]), torch.tensor([3, 7])


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return alive(SiT(layers=3))


@pytest.fixture
def sit(plain):
    return copy.deepcopy(plain)


def with_hooks(model, module, before=None, after=None):
    """What torch's own module hooks see and make of a pass."""
    seen = {}

    def pre(_, args):
        seen["in"] = args[0].clone()
        if before:
            new = before(args[0])
            return tuple(new if arg is args[0] else arg for arg in args)

    def post(_, args, out):
        first = out[0] if isinstance(out, tuple) else out
        seen["out"] = first.clone()
        if after:
            return (after(first), *out[1:]) if isinstance(out, tuple) else after(first)

    handles = [module.register_forward_pre_hook(pre), module.register_forward_hook(post)]
    with torch.no_grad():
        out = model(X, T, Y)
    for handle in handles:
        handle.remove()
    return out, seen


@pytest.mark.parametrize("adapter", [None, SIT])
def test_reads_and_edits_are_those_of_module_hooks(plain, sit, adapter):
    model = HookedDiT(sit, blocks="layers", adapter=adapter)
    shift = torch.randn(64)
    for layer in range(3):
        block, at = plain.layers[layer], f"blocks.{layer}"
        for module, before, after in (
            (block, f"{at}.hook_resid_pre", f"{at}.hook_resid_post"),
            (block.attention, f"{at}.attn.hook_in", f"{at}.attn.hook_out"),
            (block.mlp, f"{at}.mlp.hook_in", f"{at}.mlp.hook_out"),
        ):
            want, seen = with_hooks(plain, module)
            with dit_lens.trace(model) as t, torch.no_grad():
                assert torch.equal(sit(X, T, Y), want)
            assert torch.equal(t[before][0], seen["in"]) and torch.equal(t[after][0], seen["out"])
            for name, edit in ((before, "before"), (after, "after")):
                want, _ = with_hooks(plain, module, **{edit: lambda x: x + shift})
                with model.hooks([(name, lambda a, hook: a + shift)]), torch.no_grad():
                    assert torch.equal(sit(X, T, Y), want), name
    model.remove()
    assert not any("forward" in vars(module) for module in sit.modules())
    assert torch.equal(sit(X, T, Y), plain(X, T, Y))


class InPlace(SiT):
    """It takes its inputs for its own."""

    def forward(self, x, t, y):
        x *= 0.9
        t += 0.01
        return super().forward(x, t, y)


def test_a_model_may_change_its_inputs_in_place():
    torch.manual_seed(0)
    sit = alive(InPlace(layers=2))
    scheduler = FlowMatchEulerDiscreteScheduler()
    model = HookedDiT(sit, scheduler, blocks="layers", adapter=SIT)
    name = "blocks.1.hook_resid_post"
    with dit_lens.trace(model, names=name) as recorded, dit_lens.trace(model) as t, torch.no_grad():
        sit(X.clone(), T.clone(), Y)
    for _ in range(2):  # a reading changes nothing that is kept
        assert torch.equal(t[name], recorded[name]) and torch.equal(t.latents[0], X)
    run = dit_lens.sample(model, [3, 7], steps=3, scheduler=scheduler)
    assert torch.equal(run.latents[0], dit_lens.sample(model, [3, 7], steps=1).latents[0])
    assert torch.equal(run.replay(0).latents, run.latents)
    assert torch.equal(run.activations(name), run.activations(name))
    given = X.clone()
    with torch.no_grad():
        model(given, torch.tensor([500.0, 20.0]), Y)
    assert torch.equal(given, X)


def test_three_lines_and_the_gap(sit):
    model = HookedDiT(sit, FlowMatchEulerDiscreteScheduler(), blocks="layers", adapter=SIT)
    assert model.cfg.grid == (8, 8) and model.cfg.d_model == 64 and model.cfg.null_class == 10
    found = measure_gap(model, pairs=16, steps=4, resamples=20)
    assert found.layer_gap.sizes["layer"] == 4 and "gap" in found.attrs["headline"]
    with dit_lens.trace(model) as t:
        t.ablate("attn.hook_out", steps=[1])
        run = dit_lens.sample(model, [3, 7], steps=3, guidance=2.0)
    out = t["hook_sample"]
    assert run.latents.isfinite().all() and out.shape == (3, 4, 1, 16, 16)
    pair = dit_lens.twins(model, pairs=1, steps=3, release=1)
    assert torch.equal(pair.run.latents[1][0], pair.run.latents[1][1])
    with pytest.raises(InvalidState, match="its attention can't couple twins; expected tie='noise"):
        dit_lens.twins(model, pairs=1, steps=3, release=2, tie="attention", g=0.5)


def test_the_lens_reads_the_last_stream(sit):
    model = HookedDiT(sit, blocks="layers", adapter=SIT)
    t = torch.tensor([700.0, 31.0])
    with torch.no_grad():
        out, cache = model.run_with_cache(X, t, Y)
        assert torch.equal(model.unembed(cache["resid_post", -1], t, Y), out)
        assert torch.equal(model(X, t, Y, stop_at_layer=1), cache["resid_pre", 1])


@pytest.mark.parametrize("counts", [1000, 100, 10])
def test_its_time_is_told_by_its_schedulers_own_timesteps(sit, counts):
    seen = []

    def see(_, args, named):
        seen.append([*args, *named.values()][1][0].item())

    sit.register_forward_pre_hook(see, with_kwargs=True)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=counts)
    model = HookedDiT(sit, scheduler, blocks="layers", adapter=SIT)
    with dit_lens.trace(model) as t:
        seen.clear()
        run = dit_lens.sample(model, [3], steps=2)
    assert seen == [pytest.approx(1 - time / counts) for time in run.timesteps]
    assert torch.allclose(t.timesteps.flatten(), run.timesteps.double(), rtol=1e-4)
    assert torch.equal(run.replay(0).latents, run.latents)
    other = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50)
    with pytest.raises(InvalidValue, match=f"counts 50 timesteps, .* opened with {counts}, by wh"):
        dit_lens.sample(model, [3], steps=2, scheduler=other)
    with pytest.raises(InvalidState, match=f"open already, with a scheduler of {counts} timesteps"):
        HookedDiT(model, other)
    model.remove()
    del model, run, t
    again = HookedDiT(sit, other, blocks="layers", adapter=SIT)
    assert again.family.units == 50


def test_the_time_of_a_copy_is_its_own(sit):
    flow = [FlowMatchEulerDiscreteScheduler(num_train_timesteps=n) for n in (100, 10)]
    model = HookedDiT(sit, flow[0], blocks="layers", adapter=SIT)
    other = HookedDiT(copy.deepcopy(sit), flow[1])
    assert (model.family.units, other.family.units) == (100, 10)


class Skipping(SiT):
    def forward(self, x, t, y):
        return super().forward(x, t, y) * (1 + x.flatten(1).mean(1)[:, None, None, None])


class Adding(SiT):
    def forward(self, x, t, y):
        return super().forward(x, t, y) + 0.5 * x


@pytest.mark.parametrize("form", [Skipping, Adding])
def test_no_lens_where_the_output_depends_on_x_besides(plain, form):
    sit = copy.deepcopy(plain)
    sit.__class__ = form
    model = HookedDiT(sit, blocks="layers", adapter=SIT)
    with pytest.raises(InvalidState, match="the output depends on more than that stream"):
        model.unembed(torch.randn(2, 64, 64), torch.tensor([700.0, 31.0]), Y)


class Second(nn.Module):
    """A block whose stream is not its first argument."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, scale, hidden_states):
        return hidden_states + self.mlp(hidden_states) * scale


class Seconds(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Second() for _ in range(2))

    def forward(self, x, t):
        stream = self.embed(x.flatten(2).mT)
        for layer in self.layers:
            stream = layer(t[:, None, None], stream)
        return self.last(stream).mT.reshape(x.shape)


def test_the_stream_behind_another_argument_is_the_one_left_alone():
    model = HookedDiT(alive(Seconds()), blocks="layers", adapter=Adapter((4, 2, 2)))
    t = torch.tensor([700.0, 31.0])
    out, cache = model.run_with_cache(FOURS, t, {})
    assert torch.equal(model.unembed(cache["resid_post", -1], t, {}), out)


def test_what_needs_what_blocks_add_is_refused(sit):
    model = HookedDiT(sit, FlowMatchEulerDiscreteScheduler(), blocks="layers", adapter=SIT)
    run = dit_lens.sample(model, [3], steps=3)
    with dit_lens.trace(model) as t:
        for ask in (
            lambda: t.hold("blocks.1", steps=[1]),
            lambda: t.hold("blocks.1.attn", steps=[1]),
            lambda: Plan.of(model, run.timesteps, [(1, "attn", 1)]),
            lambda: cause_map(model, items=8, steps=3),
            lambda: reuse_plan(model, budget=0.8, items=8, steps=3),
            lambda: diagnose(model, run, lambda images: images.mean((1, 2, 3))),
        ):
            with pytest.raises(InvalidState, match="What this model's blocks add has no hook poin"):
                ask()


def test_a_copy_of_an_open_model_is_opened_by_the_same_words(sit):
    HookedDiT(sit, blocks="layers", adapter=SIT)
    other = copy.deepcopy(sit)
    again = HookedDiT(other, blocks="layers", adapter=dataclasses.replace(SIT))
    assert again.transformer is other
    with pytest.raises(InvalidState, match="This SiT is open already, and otherwise; call remove"):
        HookedDiT(other, blocks="layers")


def test_it_is_remembered_and_taken_out(sit):
    """A trace of the bare module opens it as it was described."""
    model = HookedDiT(sit, blocks="layers", adapter=SIT)
    again = HookedDiT(sit, blocks="layers", adapter=SIT)
    assert again.instrumentation is model.instrumentation
    with pytest.raises(InvalidState, match="This SiT is open already, and otherwise; call remove"):
        HookedDiT(sit, blocks="layers")
    model.remove()
    with dit_lens.trace(sit) as t, torch.no_grad():
        sit(X, T, Y)
    assert t["resid_post", 2].shape == (1, 2, 64, 64)
    other = HookedDiT(sit, blocks="layers", parts={"mixer": "attention"})
    assert "blocks.0.mixer.hook_out" in other.names and "blocks.0.mlp.hook_out" not in other.names


def test_tokens_beside_the_image(sit):
    """A model with tokens of its own, and skips, opened by its paths."""
    torch.manual_seed(0)
    vit = alive(UViT())
    adapter = Adapter((4, 8, 8), labels=10, tokens=slice(2, None))
    lists = ["in_blocks", "mid_block", "out_blocks"]
    model = HookedDiT(vit, DDIMScheduler(1000), blocks=lists, adapter=adapter)
    assert model.cfg.tokens == 16
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([700, 31]), torch.tensor([3, 7])
    with torch.no_grad():
        out, cache = model.run_with_cache(x, t, y)
        assert cache["resid_post", 4].shape == (2, 16, 16)
        assert torch.equal(model.unembed(cache["resid_post", -1], t, y), out)
    assert dit_lens.sample(model, [3, 7], steps=3).latents.isfinite().all()
    with pytest.raises(InvalidValue, match="18 tokens, which are no grid of square patches of 8x8"):
        HookedDiT(alive(UViT()), blocks=lists, adapter=Adapter((4, 8, 8), labels=10))


@pytest.mark.parametrize(("tokens", "said"), [((0, 16), 0), ((1, 17), 1)])
def test_other_tokens_than_the_image_s_are_refused(tokens, said):
    adapter = Adapter((4, 8, 8), labels=10, tokens=slice(*tokens))
    blocks = ["in_blocks", "mid_block", "out_blocks"]
    with pytest.raises(InvalidValue, match=f"Token {said} of the last stream is one of the image"):
        HookedDiT(alive(UViT()), blocks=blocks, adapter=adapter)


class Conditioned(nn.Module):
    """Given words, and nothing else; its blocks answer in a tuple."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)
        self.core = nn.ModuleDict({"layers": nn.ModuleList(Tupled() for _ in range(2))})

    def forward(self, latent, sigma, context):
        x = self.embed(latent).flatten(2).mT + context.mean(1, keepdim=True) + sigma[:, None, None]
        for block in self.core["layers"]:
            x, _ = block(x=x)
        return {"sample": self.out(x).mT.unflatten(2, latent.shape[2:])}


class Tupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return x + self.ff(x), None


def test_words_as_dictionaries_and_blocks_that_return_tuples():
    torch.manual_seed(0)
    module = alive(Conditioned())
    adapter = Adapter(
        (3, 4, 4), labels={"context": torch.zeros(1, 5, 8)}, output=lambda out: out["sample"]
    )
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.4])
    y = {"context": torch.randn(2, 5, 8)}
    model = HookedDiT(module, DDIMScheduler(1000), blocks="core.layers")
    assert model.names[1:4] == [
        "blocks.0.hook_resid_pre", "blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out",
    ]  # fmt: skip
    with dit_lens.trace(model) as seen, torch.no_grad():
        module(x, t, **y)
    assert seen["resid_post", 0].shape == (1, 2, 16, 8)
    with pytest.raises(InvalidState, match="expected HookedDiT.module, ..., adapter=dit_lens.Ada"):
        dit_lens.sample(model, "a cat", steps=2)
    model.remove()
    with pytest.raises(InvalidValue, match="A block returns .* expected one stream through all bl"):
        HookedDiT(module, DDIMScheduler(1000), blocks="core.layers", adapter=adapter)


@pytest.mark.parametrize("other", [{"output": None}, {"time": (0.0, 1.0)}, "blocks"])
def test_what_is_kept_knows_how_a_model_is_called(sit, other, tmp_path):
    """And which of its modules are blocks."""

    def opened(blocks="layers", **changes):
        adapter = dataclasses.replace(SIT, **changes)
        return HookedDiT(sit, FlowMatchEulerDiscreteScheduler(), blocks=blocks, adapter=adapter)

    model, sizes = opened(), {"pairs": 16, "steps": 4, "resamples": 20}
    measure_gap(model, **sizes, store=tmp_path / "store")
    dit_lens.record(model, "blocks.0.hook_resid_post", [1], tmp_path / "acts", steps=2)
    model.remove()
    paths = [f"layers.{i}" for i in (1, 2)]
    again = opened(paths) if other == "blocks" else opened(**other)
    with pytest.raises(InvalidValue, match="another measurement: its model is"):
        measure_gap(again, **sizes, store=tmp_path / "store")
    with pytest.raises(InvalidValue, match="holds a recording of another model"):
        dit_lens.record(again, "blocks.0.hook_resid_post", [1], tmp_path / "acts", steps=2)


def test_a_model_without_a_label_for_no_class(sit):
    """Asked for it, torch would say that an index is out of range; on an accelerator it would end
    the process.
    """
    sit.classes = nn.Embedding(10, sit.classes.embedding_dim)
    model = HookedDiT(sit, FlowMatchEulerDiscreteScheduler(), blocks="layers", adapter=SIT)
    assert not model.cfg.has_null and sit.classes._forward_pre_hooks == {}
    assert dit_lens.sample(model, [1, 9], steps=2).latents.isfinite().all()
    with pytest.raises(ValueError, match="Label 10 is out of range; expected 0 to 9.$"):
        dit_lens.sample(model, [10], steps=2)
    for act in (dit_lens.sample, dit_lens.twins):
        with pytest.raises(
            ValueError,
            match="The model has 10 labels and none for no class, which guidance=2 needs; "
            "expected guidance=1, or, if its last label stands for none, an Adapter with labels=9",
        ):
            act(model, 4, steps=2, guidance=2.0)
    model.remove()
    with pytest.raises(ValueError, match="labels=11 can't be used; expected at most 10, the rows"):
        HookedDiT(sit, blocks="layers", adapter=dataclasses.replace(SIT, labels=11))
    said = HookedDiT(sit, blocks="layers", adapter=dataclasses.replace(SIT, labels=9))
    assert said.cfg.has_null


class Reads(nn.Module):
    """Labels read in another way than from an `nn.Embedding` at [batch]."""

    def __init__(self, table, read):
        super().__init__()
        self.table, self.read = table, read

    def forward(self, y):
        return self.read(self.table, y)


WIDTH = 64
READ = {
    "parameter": lambda: (nn.Parameter(torch.randn(10, WIDTH)), lambda w, y: w[y]),
    "functional": lambda: (
        nn.Parameter(torch.randn(10, WIDTH)),
        lambda w, y: nn.functional.embedding(y, w),
    ),
    "one hot": lambda: (
        nn.Linear(10, WIDTH),
        lambda m, y: m(nn.functional.one_hot(y, 10).to(m.weight)),
    ),
    "by name": lambda: (nn.Embedding(10, WIDTH), lambda m, y: m(input=y)),
    "an axis more": lambda: (nn.Embedding(10, WIDTH), lambda m, y: m(y[:, None])[:, 0]),
}


@pytest.mark.parametrize("how", READ)
def test_a_label_for_none_is_tried_however_labels_are_read(plain, how):
    sit = copy.deepcopy(plain)
    sit.classes = Reads(*READ[how]())
    model = HookedDiT(sit, FlowMatchEulerDiscreteScheduler(), blocks="layers", adapter=SIT)
    assert not model.cfg.has_null
    with pytest.raises(InvalidValue, match="has 10 labels and none for no class, which guidance=2"):
        dit_lens.sample(model, 4, steps=2, guidance=2.0)
    model.remove()
    with pytest.raises(
        InvalidValue, match="labels=20 can't be used; expected (at most 10|fewer: SiT)"
    ):
        HookedDiT(sit, blocks="layers", adapter=dataclasses.replace(SIT, labels=20))
    fewer = HookedDiT(sit, blocks="layers", adapter=dataclasses.replace(SIT, labels=9))
    assert fewer.cfg.has_null


@pytest.mark.parametrize("rows", [1, 5, 10])
def test_a_table_of_times_is_no_table_of_labels(plain, rows):
    sit = copy.deepcopy(plain)
    times = sit.times = nn.Embedding(rows, WIDTH)
    sit.classes = Reads(sit.classes, lambda table, y: table(y) + times(torch.zeros_like(y)))
    assert HookedDiT(sit, blocks="layers", adapter=SIT).cfg.has_null


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    module, runs = alive(Folded()), []
    away = accelerate.cpu_offload(copy.deepcopy(module), execution_device=torch.device("cpu"))
    adapter = Adapter((4, 2, 2), tokens=slice(2, None))
    for each in (module, away):
        model = HookedDiT(each, DDIMScheduler(1000), blocks="layers", adapter=adapter)
        runs.append(dit_lens.sample(model, [0], steps=2).latents)
    assert torch.equal(*runs)


class Weightless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Tanh(), nn.Tanh()])

    def forward(self, x, t):
        stream = x.flatten(2).mT
        for layer in self.layers:
            stream = layer(stream)
        return stream.mT.reshape(x.shape)


def test_a_model_without_weights():
    model = HookedDiT(
        Weightless().eval(), DDIMScheduler(), blocks="layers", adapter=Adapter((4, 2, 2))
    )
    assert dit_lens.sample(model, [0], steps=2).latents.isfinite().all()


def test_a_model_without_labels():
    class Unconditional(SiT):
        def forward(self, x, t):
            return super().forward(x, t, torch.full((len(x),), 10))

    module = alive(Unconditional(layers=2))
    adapter = Adapter((1, 16, 16), time=(1.0, 0.0), output=torch.neg)
    model = HookedDiT(module, FlowMatchEulerDiscreteScheduler(), blocks="layers", adapter=adapter)
    assert dit_lens.sample(model, [0, 0], steps=2).latents.isfinite().all()


class Step(nn.Module):
    """A block whose condition stands in front of its stream, or not."""

    def __init__(self, first):
        super().__init__()
        self.attn, self.mlp, self.first = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), first

    def forward(self, a, b):
        x, c = (b, a) if self.first else (a, b)
        return x + self.mlp(x + c) + self.attn(x, x, x, need_weights=False)[0]


class Stepping(nn.Module):
    """Its blocks stand in a ModuleDict, and its answer among others in a dict."""

    def __init__(self, first=False, turned=False):
        super().__init__()
        self.embed, self.last, self.words = nn.Linear(4, 8), nn.Linear(8, 4), nn.Embedding(11, 8)
        self.steps = nn.ModuleDict({name: Step(first) for name in ("one", "two", "three")})
        self.first, self.turned, self.aux = first, turned, None

    def forward(self, x, t, y):
        h = self.embed(x.flatten(2))
        c = self.words(y)[:, None].expand_as(h)
        if self.turned:
            h, c = h.transpose(0, 1), c.transpose(0, 1)
        for block in self.steps.values():
            h = block(c, h) if self.first else block(h, c)
        if self.turned:
            h = h.transpose(0, 1)
        return {"pred": self.last(h).reshape(x.shape), "aux": c if self.aux is None else self.aux}


FOURS = torch.randn(2, 4, 2, 2)


def test_blocks_in_a_module_dict_and_an_answer_among_others():
    module = alive(Stepping())
    adapter = Adapter((4, 2, 2), labels=10, output=lambda out: out["pred"], grid=(2, 2))
    model = HookedDiT(module, FlowMatchEulerDiscreteScheduler(), blocks="steps", adapter=adapter)
    assert model.cfg.n_layers == 3
    with torch.no_grad():
        out, cache = model.run_with_cache(FOURS, T, Y)
        assert torch.equal(out, module(FOURS, T, Y)["pred"])
        assert torch.equal(cache["hook_sample"], out)
        with model.hooks([("hook_sample", lambda a, hook: 2 * a)]):
            assert torch.equal(module(FOURS, T, Y)["pred"], 2 * out)
    model.remove()
    HookedDiT(module, blocks="steps")
    with dit_lens.trace(module) as t, torch.no_grad():
        module(FOURS, T, Y)
    assert torch.equal(t["hook_sample"][0], out)
    module.aux = FOURS
    with pytest.raises(InvalidState, match="'hook_sample' can't be read: .* is a dict of a tensor"):
        with dit_lens.trace(module):
            module(FOURS, T, Y)


def test_what_is_no_stream_is_not_read_as_one():
    """A condition in front of the stream, and tokens in front of the items."""
    fits = {"labels": 10, "output": lambda out: out["pred"], "grid": (2, 2)}
    module = alive(Stepping(first=True))
    with pytest.raises(InvalidValue, match="Block 1 is given as 'a' the very tensor that the bloc"):
        HookedDiT(module, blocks="steps", adapter=Adapter((4, 2, 2), **fits))
    HookedDiT(module, blocks="steps")
    with dit_lens.trace(module, names="resid_post"):
        module(FOURS, T, Y)
    with pytest.raises(InvalidState, match="Block 1 is given as 'a' the very tensor that the bloc"):
        with dit_lens.trace(module, names="resid_pre"):
            module(FOURS, T, Y)
    module = alive(Stepping(turned=True))
    HookedDiT(module, blocks="steps", parts={"attn": "attn"})
    for name in ("hook_resid_pre", "hook_resid_post", "attn.hook_in", "attn.hook_out"):
        with pytest.raises(InvalidState, match=r"has shape \[4, 2, 8\] for 2 items; expected a st"):
            with dit_lens.trace(module, names=f"blocks.1.{name}"):
                module(FOURS, T, Y)


class Rest(SiT):
    def forward(self, x, t, *rest, scale=1.0):
        return super().forward(x, t, *rest) * scale


class Placed(SiT):
    def forward(self, x, t, y, /, **more):
        return super().forward(x, t, y) * more.get("scale", 1.0)


class Named(SiT):
    def forward(self, x, *, t, **more):
        return super().forward(x, t, more["y"]) * more.get("scale", 1.0)


class Wrapped(SiT):
    def forward(*every, **more):
        return SiT.forward(*every, **more)


@pytest.mark.parametrize("form", [Rest, Placed, Named])
def test_a_forward_is_called_as_its_caller_calls_it(plain, form):
    sit, call = copy.deepcopy(plain), (X, T, Y)
    sit.__class__ = form
    named = {"t": T, "y": Y} if form is Named else {}
    args, named = call[: 1 if named else 3], {**named, "scale": 2.0}
    with torch.no_grad():
        want = sit(*args, **named)
        with HookedDiT(sit, blocks="layers") as model, dit_lens.trace(model) as t:
            assert torch.equal(sit(*args, **named), want)
            with pytest.raises(TypeError):
                sit(*args, **named, x=X)
        assert torch.equal(t["hook_sample"][0], want)


def test_wrong_calls_are_python_s_own_errors(sit):
    model = HookedDiT(sit, blocks="layers")
    with pytest.raises(TypeError, match="multiple values for argument 't'"):
        sit(X, T, Y, t=T)
    with pytest.raises(TypeError, match="too many positional arguments"):
        sit(X, T, Y, 1)
    model.remove()


def test_arguments_without_names_are_refused_at_opening(plain):
    sit = copy.deepcopy(plain)
    sit.__class__ = Wrapped
    with pytest.raises(InvalidType, match=r"forward takes \(\*every, \*\*more\), in which x_t and"):
        HookedDiT(sit, blocks="layers")
    sit.__class__ = Rest
    with pytest.raises(InvalidValue, match="labels=10 can't be given to Rest, whose forward names"):
        HookedDiT(sit, blocks="layers", adapter=SIT)
    sit.__class__ = Named
    said = dataclasses.replace(SIT, names=("x", "t", "y"))
    model = HookedDiT(sit, FlowMatchEulerDiscreteScheduler(), blocks="layers", adapter=said)
    assert dit_lens.sample(model, [3], steps=2).latents.isfinite().all()


class Folding(nn.Module):
    """A block with attention in windows, and an MLP that is given some of the tokens."""

    def __init__(self, width=8, alone=slice(None)):
        super().__init__()
        self.attn, self.mlp, self.alone = nn.Linear(width, width), nn.Linear(width, width), alone

    def forward(self, x):
        windows = x.unflatten(1, (-1, 2)).flatten(0, 1)
        x = x + self.attn(windows).reshape(x.shape)
        return torch.cat([x[:, : self.alone.start or 0], self.mlp(x[:, self.alone])], dim=1)


class Folded(nn.Module):
    def __init__(self, beside=2, alone=slice(None)):
        super().__init__()
        self.embed, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Folding(alone=alone) for _ in range(2))
        self.beside = nn.Parameter(torch.randn(1, beside, 8))

    def forward(self, x, t):
        others = self.beside.expand(len(x), -1, -1) + t[:, None, None]
        stream = torch.cat([others, self.embed(x.flatten(2).mT)], dim=1)
        for layer in self.layers:
            stream = layer(stream)
        return self.last(stream[:, others.shape[1] :]).mT.reshape(x.shape)


def test_windows_in_the_place_of_items_are_refused():
    module = alive(Folded())
    model = HookedDiT(module, blocks="layers", parts={"attn": "attn"})
    for act in (
        lambda t: t.ablate("blocks.1.attn.hook_out", items=[1]),
        lambda t: t.edit("blocks.1.attn.hook_in", lambda a, hook: None),
    ):
        with pytest.raises(InvalidState, match=r"\[6, 2, 8\] for 2 items; expected a stream \[2"):
            with dit_lens.trace(model) as t, torch.no_grad():
                act(t)
                module(FOURS, T)
    with torch.no_grad(), dit_lens.trace(model) as t:
        module(FOURS, T)
    assert t["resid_post", 1].shape == (1, 2, 6, 8)


def test_a_part_that_is_given_the_image_s_tokens_alone():
    module = alive(Folded(alone=slice(2, None)))
    adapter = Adapter((4, 2, 2), tokens=slice(2, None))
    model = HookedDiT(module, blocks="layers", parts={"mlp": "mlp"}, adapter=adapter)
    seen, name = [], "blocks.1.mlp.hook_out"
    with torch.no_grad():
        handle = module.layers[1].mlp.register_forward_hook(lambda _, args, out: seen.append(out))
        with dit_lens.trace(model) as t:
            module(FOURS, T)
        handle.remove()
        assert torch.equal(t[name][0], seen[0])
        with model.hooks([(name, lambda a, hook: 0 * a)]):
            got = module(FOURS, T)
        module.layers[1].mlp.register_forward_hook(lambda _, args, out: 0 * out)
        assert torch.equal(got, module(FOURS, T))


@pytest.mark.parametrize(("beside", "alone"), [(2, slice(3, None)), (4, slice(4, None))])
def test_a_part_that_is_given_other_tokens(beside, alone):
    module = alive(Folded(beside, alone))
    adapter = Adapter((4, 2, 2), tokens=slice(beside, None))
    model = HookedDiT(module, blocks="layers", parts={"mlp": "mlp"}, adapter=adapter)
    with pytest.raises(InvalidState, match="is given . tokens, and which of them are the image's"):
        with model.hooks([("blocks.1.mlp.hook_out", lambda a, hook: 0 * a)]):
            module(FOURS, T)


class Twice(nn.Module):
    """A block that runs its MLP twice."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(2):
            x = x + self.mlp(x)
        return x


def test_a_part_that_runs_twice_is_refused():
    module = alive(Folded())
    module.layers = nn.ModuleList(alive(Twice()) for _ in range(2))
    model, name = HookedDiT(module, blocks="layers", parts={"mlp": "mlp"}), "blocks.1.mlp.hook_out"
    said = "'blocks.1.mlp.hook_in' runs more than once in a pass"
    with pytest.raises(InvalidState, match=said):
        model.activations(FOURS, T, {}, name)
    with torch.no_grad(), dit_lens.trace(model) as t:
        module(FOURS, T)
    assert t["resid_post", 1].shape == (1, 2, 6, 8)
    with pytest.raises(InvalidState, match=said):
        t[name]
    with pytest.raises(InvalidState, match=said):
        with model.hooks([(name, lambda a, hook: 0 * a)]):
            module(FOURS, T)


def test_parts_that_are_one_module_are_refused(sit):
    with pytest.raises(InvalidValue, match="'a' of block 0 and 'b' of block 0 are one module, a"):
        HookedDiT(sit, blocks="layers", parts={"a": "mlp", "b": "mlp"})
    sit.layers[2].mlp = sit.layers[0].mlp
    with pytest.raises(InvalidValue, match="'mlp' of block 0 and 'mlp' of block 2 are one module"):
        HookedDiT(sit, blocks="layers")
    assert HookedDiT(sit, blocks="layers", parts={"attn": "attention"}).cfg.n_layers == 3


def test_a_trace_of_other_hook_points_says_which(plain, tmp_path):
    module = copy.deepcopy(plain)
    model = HookedDiT(module, blocks="layers")
    with dit_lens.trace(model) as t, torch.no_grad():
        module(X, T, Y)
    path = t.save(tmp_path / "t.safetensors")
    model.remove()
    with pytest.raises(InvalidValue, match="its blocks.0.attn.hook_in is .*, this one's none"):
        dit_lens.load_trace(path, HookedDiT(module, blocks="layers", parts={}))


def test_a_model_that_has_run_can_be_pickled(sit):
    sit.__class__ = SiT
    with HookedDiT(sit, blocks="layers") as model, dit_lens.trace(model), torch.no_grad():
        sit(X, T, Y)
        again = pickle.loads(pickle.dumps(sit))
        assert torch.equal(again(X, T, Y), sit(X, T, Y))


@dataclasses.dataclass(frozen=True)
class Answer:
    extra: torch.Tensor
    velocity: torch.Tensor


class Answering(SiT):
    form = staticmethod(lambda score, out: (score, out))

    def forward(self, x, t, y):
        out = super().forward(x, t, y)
        return self.form(out.flatten(1).mean(1), out)


FORMS = [
    (lambda score, out: (score, out), lambda a: -a[1]),
    (lambda score, out: [None, out, score], lambda a: a[1].neg_()),
    (Answer, lambda a: -a.velocity),
    (lambda score, out: {"score": score, "out": out}, lambda a: -a["out"]),
]


@pytest.mark.parametrize(("form", "output"), FORMS)
def test_hook_sample_is_what_output_makes_its_answer_of(plain, form, output):
    sit = copy.deepcopy(plain)
    sit.__class__, sit.form = Answering, form
    adapter, t = dataclasses.replace(SIT, output=output), torch.tensor([700.0, 100.0])
    model = HookedDiT(sit, blocks="layers", adapter=adapter)
    with torch.no_grad():
        want = plain(X, torch.tensor([0.3, 0.9]), Y)
        with dit_lens.trace(model) as seen:
            assert torch.equal(model(X, t, Y), -want)
        assert torch.equal(seen["hook_sample"][0], want)
        with model.hooks([("hook_sample", lambda a, hook: 2 * a)]):
            assert torch.equal(model(X, t, Y), -2 * want)


def test_an_answer_of_several_values_is_only_read(plain):
    sit = copy.deepcopy(plain)
    sit.__class__, sit.form = Answering, lambda score, out: (score, out)
    both = dataclasses.replace(SIT, output=lambda a: a[1] + a[0][:, None, None, None])
    model, t = HookedDiT(sit, blocks="layers", adapter=both), torch.tensor([700.0, 100.0])
    with torch.no_grad():
        with dit_lens.trace(model) as seen:
            out = model(X, t, Y)
        assert torch.equal(seen["hook_sample"][0], out)
        with pytest.raises(InvalidState, match="makes of several values, into which another can't"):
            with model.hooks([("hook_sample", lambda a, hook: 2 * a)]):
                model(X, t, Y)


def test_the_first_of_several_may_have_no_axes_but_the_batch(plain):
    sit = copy.deepcopy(plain)
    sit.__class__, sit.form = Answering, lambda score, out: (score, out)
    with HookedDiT(sit, blocks="layers") as model, dit_lens.trace(model) as t, torch.no_grad():
        sit(X, T, Y)
    assert t["hook_sample"].shape == (1, 2) and t["resid_post", 1].shape == (1, 2, 64, 64)
    sit.form = lambda score, out: (score.mean(), out)
    with pytest.raises(InvalidState, match="'hook_sample' can't be read: .* numbers for each item"):
        with HookedDiT(sit, blocks="layers") as model, dit_lens.trace(model) as t:
            sit(X, T, Y)


@pytest.mark.parametrize("form", ["[batch]", "[batch, 1]", "one hot"])
def test_labels_in_other_forms_are_traced(plain, form):
    sit = copy.deepcopy(plain)
    sit.classes = Reads(
        sit.classes, lambda table, y: table(y.argmax(1) if y.shape[1:] == (10,) else y.flatten())
    )
    model = HookedDiT(sit, blocks="layers", adapter=SIT)
    one_hot = nn.functional.one_hot(Y, 10).float()
    y = {"[batch]": Y, "[batch, 1]": Y[:, None], "one hot": one_hot}[form]
    with torch.no_grad(), dit_lens.trace(model) as t:
        sit(X, T, y)
    assert t["resid_post", 1].shape == (1, 2, 64, 64)
    told = t.to_xarray("resid_post").coords
    assert "label" not in told if form == "one hot" else told["label"].values.tolist() == [3, 7]


def test_one_time_for_all(sit):
    model = HookedDiT(sit, blocks="layers", adapter=SIT)
    with torch.no_grad():
        want = model(X, torch.tensor([700.0, 700.0]), Y)
        for t in (700, 700.0, torch.tensor(700.0)):
            assert torch.equal(model(X, t, Y), want)
    for wrong, said in (
        (None, "t=None"),
        (torch.ones(3), r"expected timesteps \[2\], one for each"),
    ):
        with pytest.raises((InvalidType, InvalidValue), match=said):
            model(X, wrong, Y)


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (torch.tensor([3, 11]), "Label 11 is out of range; expected 0 to 9, or 10 for no class"),
        (torch.tensor([-1, 3]), "Label -1 is out of range"),
        (torch.tensor([1, 2, 3]), r"expected labels \[2\], one for each item"),
    ],
)
def test_labels_that_do_not_fit_are_refused(sit, y, said):
    with pytest.raises(InvalidValue, match=said):
        HookedDiT(sit, blocks="layers", adapter=SIT)(X, torch.tensor([700.0, 31.0]), y)


class Told(Weightless):
    def forward(self, x, t, context):
        return super().forward(x, t) + context.mean((1, 2))[:, None, None, None]


def test_a_time_that_comes_first_is_known_by_its_name():
    class TimeFirst(SiT):
        def forward(self, timestep, img, y):
            return super().forward(img, timestep, y)

    class Nameless(SiT):
        def forward(self, a, b, y):
            return super().forward(b, a, y)

    model = alive(TimeFirst(layers=3))
    opened = HookedDiT(model, DDIMScheduler(1000), blocks="layers", adapter=SIT)
    with torch.no_grad(), dit_lens.trace(opened) as t:
        model(T[:1], X, Y)
    assert t.timesteps.item() == pytest.approx(700) and torch.equal(t.latents[0], X)
    opened.remove()
    model = alive(Nameless(layers=3))
    with torch.no_grad(), dit_lens.trace(HookedDiT(model, blocks="layers")):
        with pytest.raises(InvalidValue, match=r"'a' was given .*, and is taken for x_t, 'b' for"):
            model(T, X, Y)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"ctx": torch.zeros(1, 4, 8)}, "has 'ctx'; expected 'context', as Adapter"),
        ({"context": torch.zeros(2, 4, 8)}, "expected a tensor of one item"),
        ({"context": torch.zeros(1, 4, 8).numpy()}, "expected a tensor of one item"),
        ({}, "has no 'context', which Adapter"),
        ({"context": torch.zeros(1, 4, 8).double()}, r"of float64; expected a tensor \[1, 4, 8\]"),
        ({"context": torch.zeros(1, 4, 9)}, r"\[1, 4, 9\] of float32; expected a tensor \[1, 4, 8"),
        ({"context": torch.zeros(1, 4)}, "or another length of it, as Adapter"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(condition, said):
    adapter = Adapter((4, 2, 2), labels={"context": torch.zeros(1, 4, 8)})
    model = HookedDiT(Told().eval(), DDIMScheduler(1000), blocks="layers", adapter=adapter)
    with pytest.raises(InvalidValue, match=said):
        model.conditions.add({"a fox": condition})
    assert "a fox" not in model.conditions.prompts


def test_conditions_of_several_lengths_are_refused_as_one_batch():
    adapter = Adapter((4, 2, 2), labels={"context": torch.zeros(1, 4, 8)})
    model = HookedDiT(Told().eval(), DDIMScheduler(1000), blocks="layers", adapter=adapter)
    for prompt, length in (("a fox", 4), ("a dog", 6)):
        model.conditions.add({prompt: {"context": torch.randn(1, length, 8)}})
    assert dit_lens.sample(model, ["a fox"], steps=2).latents.isfinite().all()
    with pytest.raises(InvalidValue, match="have context of the shapes .* expected one length for"):
        dit_lens.sample(model, ["a fox", "a dog"], steps=2)


@pytest.mark.parametrize("adapter", [None, Adapter((4, 3, 2, 2), grid=(3, 2, 2))])
def test_an_answer_of_unknown_axes_is_stored_and_loaded(adapter, tmp_path):
    module, film = Weightless().eval(), torch.randn(2, 4, 3, 2, 2)
    model = HookedDiT(module, blocks="layers", adapter=adapter)
    with torch.no_grad(), dit_lens.trace(model, names=["hook_sample", "resid_post"]) as t:
        out = module(film, T)
    assert t.to_xarray("hook_sample").hook_sample.dims[1:] == (
        "batch", "output_0", "output_1", "output_2", "output_3",
    )  # fmt: skip
    assert t.to_xarray().hook_sample.sizes["output_1"] == 3
    t.save(tmp_path / "film")
    assert torch.equal(dit_lens.load_trace(tmp_path / "film")["hook_sample"][0], out)


# Refusals.


def test_labels_without_an_adapter_are_given_by_name(plain):
    model = HookedDiT(copy.deepcopy(plain), blocks="layers")
    with torch.no_grad():
        assert torch.equal(model(X, T, {"y": Y}), plain(X, T, Y))
    for y in (Y, 3, "a fox"):
        with pytest.raises(InvalidValue, match=r"What SiT takes besides x_t .* {'y': labels}, or"):
            model.run_with_cache(X, T, y)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_of_ones_own_are_refused_as_such(plain, whole):
    module = copy.deepcopy(plain)
    if whole:
        module = torch.compile(module)
    else:
        module.layers[1] = torch.compile(module.layers[1])
    with pytest.raises(InvalidState, match="The model is compiled"):
        HookedDiT(module, blocks="layers")


def test_anything_else_is_told_the_three_ways_on():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(InvalidType) as error:
        HookedDiT(Mine())
    ways = "blocks='path.of.blocks'", "adapter=dit_lens.Adapter", "a family of your own"
    for said in (*ways, "DiTTransformer2DModel", "docs: Your own model", "modules: 'stack')"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"blocks": "layer"}, r"SiT has no module at blocks='layer' \(nearest: 'layers'\)"),
        ({"blocks": []}, "holds no block"),
        ({"blocks": ["layers", "layers"]}, "holds a block more than once"),
        ({"blocks": 3}, "blocks"),
        ({"blocks": "layers", "parts": {"attn": "attn"}}, r"parts\['attn'\]='attn' \(nearest"),
        ({"adapter": SIT}, "adapter= also needs blocks=, .*its lists of modules: 'layers'"),
        ({"blocks": "layers", "adapter": "sit"}, "adapter='sit' can't be used"),
        ({"blocks": "layers", "adapter": Adapter(labels=10)}, r"latents=\(\) can't be used"),
        ({"blocks": "layers", "adapter": Adapter((1, 16, 12), labels=10)}, "can't be called as"),
        ({"blocks": "layers", "adapter": Adapter((3, 16, 16), labels=10)}, "can't be called as"),
        ({"blocks": "layers", "adapter": Adapter((1, 16, 16), {"c": torch.zeros(1)})}, "argument"),
        (
            {"blocks": "layers", "adapter": Adapter((1, 16, 16), 10, output=lambda x: x[..., :8])},
            r"answers with shape \[1, 16, 8\] to latents \[1, 16, 16\]",
        ),
        (
            {
                "blocks": "layers",
                "adapter": Adapter((1, 16, 16), 10, output=lambda x: x.repeat(1, 3, 1, 1)),
            },
            r"answers with 3 channels to latents \[1, 16, 16\]; expected 1, 2 with a variance",
        ),
        (
            {"blocks": "layers", "adapter": Adapter((1, 16, 16), 10, names=("z",))},
            "the arguments of SiT.forward",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(sit, arguments, said):
    with pytest.raises((InvalidType, InvalidValue), match=said):
        HookedDiT(sit, **arguments)
    assert not any("forward" in vars(module) for module in sit.modules())


def test_blocks_in_another_order_than_they_run(sit):
    class Turned(SiT):
        def forward(self, x, t, y):
            self.layers = nn.ModuleList(reversed(self.layers))
            try:
                return super().forward(x, t, y)
            finally:
                self.layers = nn.ModuleList(reversed(self.layers))

    module = alive(Turned(layers=3))
    with pytest.raises(InvalidValue, match="The blocks run in the order 2, 1, 0; expected each of"):
        HookedDiT(module, blocks="layers", adapter=SIT)
    model = HookedDiT(module, blocks="layers")
    with pytest.raises(InvalidState, match="Block 1 runs after block 2, so that layer numbers wou"):
        model.run_with_cache(X, T, {"y": Y})


def test_opening_leaves_random_numbers_and_others_hooks_alone(sit):
    calls = []
    sit.layers[0].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    HookedDiT(sit, blocks="layers", adapter=SIT)
    assert torch.equal(torch.rand(1), want) and not calls
    sit(X, T, Y)
    assert calls


class InPlaceBlock(nn.Module):
    """A block that changes in place what its parts gave, and its own stream."""

    def __init__(self, width):
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.gate = nn.Parameter(torch.randn(width))

    def forward(self, x):
        a = self.attn(x)
        a *= self.gate
        x = x + a
        m = self.mlp(x)
        m.mul_(0.5)
        x += m
        return x


class AllInPlace(nn.Module):
    """A model that also changes the stream in place between its blocks."""

    def __init__(self, width=8, layers=3):
        super().__init__()
        self.inward, self.out = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(InPlaceBlock(width) for _ in range(layers))
        self.place = nn.Parameter(torch.randn(width))

    def forward(self, x, t):
        z = self.inward(x.flatten(2).transpose(1, 2)) + t[:, None, None]
        for block in self.blocks:
            z = block(z)
            z += self.place
        return self.out(z).transpose(1, 2).reshape(x.shape)


@pytest.fixture
def in_place():
    """The opened model, and what it is called with."""
    torch.manual_seed(0)
    parts = {"attn": "attn", "mlp": "mlp"}
    module = AllInPlace().eval()
    opened = HookedDiT(module, blocks="blocks", parts=parts, adapter=Adapter(latents=(4, 4, 4)))
    with opened as model, torch.no_grad():
        yield model, (torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.9]))


def as_they_were(model, call):
    """Parts and blocks as plain hooks see them, copied at once."""
    seen, handles = {}, []
    for i, block in enumerate(model.transformer.blocks):
        for name, part in (
            (f"blocks.{i}.attn.hook_out", block.attn),
            (f"blocks.{i}.mlp.hook_out", block.mlp),
            (f"blocks.{i}.hook_resid_post", block),
        ):
            handles.append(
                part.register_forward_hook(
                    lambda module, args, out, name=name: seen.__setitem__(name, out.clone())
                )
            )
    model.transformer(*call)
    for handle in handles:
        handle.remove()
    return seen


def test_all_readers_of_a_model_that_works_in_place_agree(in_place):
    model, call = in_place
    truth = as_they_were(model, call)
    with dit_lens.trace(model) as lazy, dit_lens.trace(model, names=list(truth)) as eager:
        model.transformer(*call)
    _, cache = model.run_with_cache(*call, None)
    every = lazy.get(list(truth))
    for name, value in truth.items():
        for read in (lazy[name][0], every[name][0], eager[name][0], cache[name]):
            assert torch.equal(read, value), name
    whole = torch.stack([truth[f"blocks.{i}.hook_resid_post"] for i in range(3)])
    assert torch.equal(lazy.stack("resid_post")[:, 0], whole)


def test_what_edits_put_into_such_a_model_stays_as_it_was(in_place):
    model, call = in_place
    patch, mine = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    kept = mine.clone()
    with dit_lens.trace(model) as t:
        t.patch("blocks.0.hook_resid_post", patch)
        t.edit("blocks.1.hook_resid_post", lambda a, hook: mine)
        for _ in range(3):
            model.transformer(*call)
    entered = t["blocks.1.hook_resid_pre"]
    assert all(torch.equal(one, patch + model.transformer.place) for one in entered)
    assert torch.equal(mine, kept) and torch.equal(t["blocks.1.hook_resid_post"][2], kept)


def test_a_hold_in_such_a_model_is_what_the_part_gave(in_place):
    model, call = in_place
    name = "blocks.0.attn.hook_out"
    with dit_lens.trace(model, names=name) as t:
        t.hold(name, steps=[1, 2])
        for scale in (1.0, 2.0, 3.0):
            model.transformer(scale * call[0], call[1])
    assert torch.equal(t[name][1], t[name][0]) and torch.equal(t[name][2], t[name][0])
