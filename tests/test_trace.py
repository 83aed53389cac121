"""The trace: what is read is what happened, whatever was recorded, edited or broken off."""

import copy
import threading

import diffusers
import pytest
import torch
from conftest import make_dit, make_pipe
from diffusers import DDIMScheduler
from safetensors.torch import save_file

import dit_lens
from dit_lens import HookedDiT
from dit_lens.errors import InvalidState

STEPS = 4


def run(pipe, labels=(3, 5), guidance=4.0):
    gen = torch.Generator().manual_seed(0)
    return pipe(
        class_labels=list(labels),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=gen,
        output_type="pt",
    ).images


def forwards(transformer):
    """Every replaced forward in the module tree; empty when nothing of ours is left."""
    return [n for n, m in transformer.named_modules() if "forward" in m.__dict__]


def test_recomputed_is_recorded_bit_for_bit(pipe):
    untouched = run(pipe)
    with dit_lens.trace(pipe, names=None) as lazy:
        assert torch.equal(run(pipe), untouched)
    with dit_lens.trace(pipe, names="*") as eager:
        assert torch.equal(run(pipe), untouched)
    assert forwards(pipe.transformer) == []
    read = lazy.get(None)
    assert list(read) == lazy.names and len(read) == 1 + 3 * 27 + 6
    for name, value in read.items():
        assert value.shape[0] == STEPS and torch.equal(value, eager[name]), name
    assert lazy["resid_post", 1].shape == (STEPS, 4, 16, 16)  # the batch is [cond | null]
    assert torch.equal(lazy.stack("resid_post")[1], lazy["blocks.1.hook_resid_post"])
    assert torch.equal(lazy["hook_sample"][2], eager.get("hook_sample", steps=2)["hook_sample"][0])


@pytest.mark.parametrize("names", [None, "resid_post"])
@pytest.mark.parametrize("kept", [{}, {"dtype": torch.float16}])
def test_a_stack_is_its_names_one_by_one(pipe, names, kept):
    with dit_lens.trace(pipe, names=names, **kept) as t:
        run(pipe)
    stack, layers = t.stack("resid_post", steps=[2, 0]), range(t.cfg.n_layers)
    one_by_one = [t.get(f"blocks.{i}.hook_resid_post", steps=[0, 2]) for i in layers]
    assert torch.equal(stack, torch.stack([v for each in one_by_one for v in each.values()]))
    assert stack.dtype == kept.get("dtype", torch.float32)


@pytest.mark.parametrize(
    "wanted, said",
    [
        (
            lambda pipe: dit_lens.trace(pipe).ablate("attn_out"),
            "the edit at 'blocks.0.hook_attn_out",
        ),
        (lambda pipe: dit_lens.trace(pipe).hold("attn_out", steps=[1]), "the edit at 'blocks.0."),
        (lambda pipe: dit_lens.trace(pipe, names="hook_embed"), "'hook_embed' was not recorded"),
        (lambda pipe: dit_lens.trace(pipe, probes=[Looking()]), "Looking saw nothing"),
    ],
)
def test_a_trace_in_which_another_model_ran_says_so(pipe, wanted, said):
    other = make_pipe(seed=5)
    with pytest.warns(UserWarning, match=f"Nothing was traced, so {said}"), wanted(pipe):
        run(other)
    with dit_lens.trace(pipe):  # nothing was wanted
        run(other)
    with pytest.raises(ZeroDivisionError), wanted(pipe):  # which says enough
        raise ZeroDivisionError


class Looking(dit_lens.Probe):
    names = "hook_embed"

    def observe(self, activation, site):
        pass

    def result(self):
        return None


def test_a_stack_of_batches_of_different_sizes_says_so(dit, inputs):
    x, t, y = inputs
    model = HookedDiT(dit)
    with dit_lens.trace(model) as trace, torch.no_grad():
        model.transformer(x, t, class_labels=y)
        model.transformer(x[:1], t[:1], class_labels=y[:1])
    with pytest.raises(ValueError, match=r"has different shapes at different steps \(.*steps=3"):
        trace.stack("resid_post")
    for read in (lambda: trace.latents, lambda: trace.to_xarray("resid_post")):
        with pytest.raises(ValueError, match=r"has different shapes at different steps \(\(1, .*"):
            read()
    assert trace.to_xarray("resid_post", steps=[1]).sizes["batch"] == 1


@pytest.mark.parametrize("names", [None, "*"])
def test_what_was_read_is_the_readers_own(pipe, names):
    with dit_lens.trace(pipe, names=names) as t:
        run(pipe)
    both = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]  # one tensor under two names
    before, latents = t.get(both, steps=[1]), t.latents
    read = t.read(both, steps=[1])
    read[both[0]][1].zero_()
    assert torch.equal(read[both[1]][1], before[both[1]][0])
    for found in (t[both[0]], t.stack("resid_post"), t.get(both)[both[0]], t.latents, t.timesteps):
        found.zero_()
    t.to_xarray(both)["hook_resid_post"].values[:] = 0
    assert torch.equal(t.latents, latents)
    for name, value in t.get(both, steps=[1]).items():
        assert torch.equal(value, before[name])


def test_what_was_recorded_twice_in_one_place_is_saved_twice(pipe, tmp_path):
    with dit_lens.trace(pipe, names=["resid_pre", "resid_post"]) as t:
        run(pipe)
    assert t["resid_pre", 1].equal(t["resid_post", 0])  # one tensor under two names
    found = dit_lens.load_trace(t.save(tmp_path / "t.safetensors"))
    for name in t.recorded_names:
        assert torch.equal(found[name], t[name])


def test_reading_stops_at_the_layer_needed_and_shares_passes(pipe):
    with dit_lens.trace(pipe) as t:
        run(pipe)
    seen = []
    handles = [
        b.register_forward_hook(lambda m, i, o, k=k: seen.append(k))
        for k, b in enumerate(pipe.transformer.transformer_blocks)
    ]
    t.get(["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"], steps=[0, 2])
    assert seen == [0, 0]  # two steps, one pass each, ended inside block 1 before it returned
    for h in handles:
        h.remove()


def test_edits_act_and_are_replayed(pipe):
    with dit_lens.trace(pipe) as plain:
        before = run(pipe)
    with dit_lens.trace(pipe, names="blocks.2.hook_resid_post") as t:
        t.edit(
            "blocks.1.hook_attn_out", lambda a, hook: a * (2 if hook.step == 1 else 3), steps=[1, 2]
        )
        after = run(pipe)
    assert not torch.equal(before, after)
    assert torch.equal(t["resid_mid", 1], t["resid_pre", 1] + t["attn_out", 1])
    # up to the first edited step all is as it was
    assert torch.equal(t["resid_pre", 0][:2], plain["resid_pre", 0][:2])
    with dit_lens.trace(pipe, names="*") as eager:
        eager.edit(
            "blocks.1.hook_attn_out", lambda a, hook: a * (2 if hook.step == 1 else 3), steps=[1, 2]
        )
        run(pipe)
    for name, value in t.get(None).items():
        assert torch.equal(value, eager[name]), name


def test_edits_in_the_body_and_outer_hooks_are_replayed_in_order(pipe):
    model = HookedDiT(pipe)
    with (
        model.hooks([("blocks.0.hook_resid_post", lambda a, hook: a + 1)]),
        dit_lens.trace(model) as t,
    ):
        t.edit("blocks.0.hook_resid_post", lambda a, hook: a * 2)
        run(pipe)
    with dit_lens.trace(model) as plain:
        run(pipe)
    assert torch.equal(t["resid_post", 0][0], (plain["resid_post", 0][0] + 1) * 2)


def test_patch_from_another_trace_gives_its_output(pipe):
    with dit_lens.trace(pipe) as a:
        run(pipe, labels=(3, 5))
    with dit_lens.trace(pipe) as b:
        b.patch("blocks.1.hook_resid_post", a)
        run(pipe, labels=(7, 9))
    assert torch.equal(b["resid_post", 2][0][2:], a["resid_post", 2][0][2:])  # same null labels
    with dit_lens.trace(pipe) as c:
        c.patch("blocks.1.hook_resid_post", c_source := a["resid_post", 1])
        run(pipe, labels=(3, 5))
    assert torch.equal(c["hook_sample"], a["hook_sample"]) and c_source.shape[0] == STEPS
    with (
        pytest.raises(
            ValueError, match=r"The patch for 'blocks.1.hook_resid_post' has shape \[1, 16, 16\]"
        ),
        dit_lens.trace(pipe) as d,
    ):
        d.patch("blocks.1.hook_resid_post", torch.zeros(1, 16, 16))
        run(pipe)
    other = HookedDiT(make_dit(layers=2))
    x = torch.zeros(1, 4, 8, 8)
    with dit_lens.trace(other) as e:
        other(x, torch.tensor([5]), torch.tensor([1]))
    with pytest.raises(ValueError, match="source trace is of another model"):
        dit_lens.trace(pipe).patch("blocks.1.hook_resid_post", e)


def test_a_patch_from_a_trace_of_two_runs_is_refused(pipe):
    name = "blocks.1.hook_resid_post"
    with dit_lens.trace(pipe) as one:
        run(pipe)
    with dit_lens.trace(pipe) as two:
        run(pipe)
        run(pipe, labels=(7, 9))
    with pytest.raises(ValueError, match="The source trace holds 2 runs.*trace each by itself"):
        dit_lens.trace(pipe).patch(name, two)
    with dit_lens.trace(pipe) as t:  # which acts at its own steps in every run
        t.patch(name, one)
        run(pipe, labels=(7, 9))
        run(pipe, labels=(1, 2))
    assert torch.equal(t[name], torch.cat([one[name], one[name]]))


def test_a_patch_from_a_run_in_parts_is_put_together(pipe):
    model, name = HookedDiT(pipe), "blocks.1.hook_resid_post"
    with dit_lens.trace(model) as parts:
        dit_lens.sample(model, [3, 5, 7], steps=2, guidance=2.0, batch=2)
    with dit_lens.trace(model) as t:
        t.patch(name, parts)
        dit_lens.sample(model, [1, 2, 4], steps=2, guidance=2.0)
    assert torch.equal(t[name], parts[name])


def test_regions(dit, inputs):
    from dit_lens import Bands

    model = HookedDiT(dit)
    bands = Bands.radial((4, 4), n=2)

    def change(name, **region):
        with dit_lens.trace(model, names=name) as plain:
            model(*inputs)
        with dit_lens.trace(model, names=name) as t:
            t.ablate(name, "zero", **region)
            model(*inputs)
        return plain[name][0], t[name][0]

    old, new = change("blocks.1.attn.hook_z", heads=1, tokens=[0, 3], items=0)
    assert (
        (new[0, [0, 3], 1] == 0).all()
        and torch.equal(new[1], old[1])
        and torch.equal(new[0, :, 0], old[0, :, 0])
    )
    assert torch.equal(new[0, 1], old[0, 1])
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    old, new = change("blocks.1.hook_resid_mid", tokens=mask)
    assert (new[:, mask.flatten()] == 0).all() and torch.equal(
        new[:, ~mask.flatten()], old[:, ~mask.flatten()]
    )
    old, new = change("blocks.1.hook_resid_mid", band=(bands, 0))
    energy = bands.energy_tokens(new)
    assert (energy[..., 0] < 1e-8).all() and torch.allclose(
        energy[..., 1], bands.energy_tokens(old)[..., 1], rtol=1e-4
    )
    old, new = change("blocks.1.attn.hook_pattern", heads=[0], tokens=2)
    assert (new[:, 0, 2] == 0).all() and torch.equal(new[:, 1], old[:, 1])
    with pytest.raises(
        ValueError,
        match="'blocks.0.hook_resid_pre' has no head axis; its axes are batch, token, d_model",
    ):
        dit_lens.trace(model).ablate("blocks.0.hook_resid_pre", heads=1)
    with pytest.raises(ValueError, match="head index 5 is out of range; expected 0 to 1"):
        change("blocks.1.attn.hook_z", heads=5)
    with pytest.raises(
        ValueError, match="mode='mode' can't be used; expected one of 'zero', 'mean', 'resample'"
    ):
        dit_lens.trace(model).ablate("hook_embed", "mode")


def test_ablations_are_what_their_words_say(dit):
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([700, 31, 400]), torch.tensor([3, 1000, 5])
    model, name = HookedDiT(dit), "blocks.1.hook_attn_out"
    plain, found = model.run_with_cache(x, t, y)[1][name], {}
    for mode in ("zero", "mean", "resample"):
        with dit_lens.trace(model) as trace:
            trace.ablate(name, mode)
            model(x, t, y)
        found[mode] = trace[name][0]
    assert (found["zero"] == 0).all() and torch.equal(found["resample"], plain[[2, 0, 1]])
    assert torch.equal(found["mean"], plain.mean(0).expand(3, -1, -1))


def test_ablations_stay_within_a_branch_of_guidance(dit):
    """An item does not get what another one adds without its label."""
    model = HookedDiT(dit, scheduler=DDIMScheduler(1000))
    name, options = "blocks.1.hook_attn_out", {"steps": 1, "guidance": 2.0}
    with dit_lens.trace(model) as trace:
        dit_lens.sample(model, [1, 2, 3], **options)
    plain, found = trace[name][0], {}
    for mode in ("mean", "resample"):
        with dit_lens.trace(model) as trace:
            trace.ablate(name, mode)
            dit_lens.sample(model, [1, 2, 3], **options)
        found[mode] = trace[name][0]
    assert torch.equal(found["resample"], plain[[2, 0, 1, 5, 3, 4]])
    means = [half.mean(0, keepdim=True).expand(3, -1, -1) for half in plain.chunk(2)]
    assert torch.equal(found["mean"], torch.cat(means))


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_one_item_alone_has_no_mean_and_no_other(dit, mode):
    """It would be put in its own place, and the site seem to do nothing."""
    model = HookedDiT(dit, scheduler=DDIMScheduler(1000))
    for guidance, said in ((1.0, "there is one, so"), (2.0, "one in each branch of guidance, so")):
        with pytest.raises(ValueError, match=said), dit_lens.trace(model) as trace:
            trace.ablate("blocks.1.hook_attn_out", mode)
            dit_lens.sample(model, [3], steps=1, guidance=guidance)


def test_changed_weights_raise_and_recorded_reads_go_on(pipe):
    with dit_lens.trace(pipe, names="hook_embed") as t:
        run(pipe)
    early = t["resid_post", 1]
    pipe.transformer.train()
    with pytest.raises(RuntimeError, match="train mode"):
        t["resid_post", 1]
    pipe.transformer.eval()
    # .data does not even bump the version
    pipe.transformer.transformer_blocks[2].ff.net[2].weight.data[3, 5] += 0.1
    with pytest.raises(
        dit_lens.NotReproduced, match=r"Step 0 can't be recomputed: from layer 2 on"
    ):
        t["resid_post", 2]
    assert torch.equal(t["resid_post", 1], early) and t.exact  # what comes before is proven
    assert t["hook_embed"].shape[0] == STEPS


def test_failures_leave_everything_as_it_was(pipe):
    untouched = run(pipe)

    def broken(a, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), dit_lens.trace(pipe, names="*") as t:
        t.edit("blocks.1.hook_resid_pre", broken)
        run(pipe)
    assert forwards(pipe.transformer) == [] and torch.equal(run(pipe), untouched)
    assert len(t.record.calls) == 0
    with pytest.raises(RuntimeError, match="Nothing was traced"):
        t["hook_embed"]
    with pytest.raises(KeyboardInterrupt), dit_lens.trace(pipe) as t:
        run(pipe)
        raise KeyboardInterrupt
    assert t["hook_embed"].shape[0] == STEPS and forwards(pipe.transformer) == []
    with pytest.raises(RuntimeError, match="its block can be opened once"), t:
        pass


def test_nesting_and_two_models(pipe):
    other = make_pipe(seed=5)
    with dit_lens.trace(pipe) as outer:
        run(pipe)
        with dit_lens.trace(other) as elsewhere, dit_lens.trace(pipe, names="hook_embed") as inner:
            run(pipe)
            run(other)
        run(pipe)
        assert len(outer.steps) == 3 * STEPS and len(inner.steps) == STEPS == len(elsewhere.steps)
        assert torch.equal(outer["hook_embed"][:STEPS], inner["hook_embed"])  # read while open
    assert forwards(pipe.transformer) == [] == forwards(other.transformer)


def test_closing_out_of_order_and_generators(pipe):
    def steps():
        with dit_lens.trace(pipe) as t:
            while True:
                run(pipe)
                yield t

    first, second = steps(), steps()
    a, b = next(first), next(second)
    assert len(a.steps) == 2 * STEPS and len(b.steps) == STEPS
    first.close()
    next(second)
    assert len(a.steps) == 2 * STEPS and len(b.steps) == 2 * STEPS
    second.close()
    assert a["hook_embed"].shape[0] == 2 * STEPS
    assert forwards(pipe.transformer) == []


def test_threads_are_refused_and_idle_ones_work(dit, inputs):
    model, problems, copied = HookedDiT(dit), [], copy.deepcopy(dit)

    def elsewhere(act):
        def body():
            try:
                act()
            except RuntimeError as error:
                problems.append(str(error))

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()

    with dit_lens.trace(model):
        elsewhere(lambda: model(*inputs))
        elsewhere(lambda: model.run_with_cache(*inputs))
        elsewhere(lambda: dit_lens.trace(model).__enter__())
        elsewhere(lambda: HookedDiT(copied)(*inputs))  # a copy is another model
    assert [p.split(";")[0] for p in problems] == [
        "This model is being traced or hooked in another thread or task",
        "This model is in use by another thread or task",
        "This model is in use by another thread or task",
    ]
    elsewhere(lambda: model.run_with_cache(*inputs))
    assert len(problems) == 3


def test_reentry_is_refused(dit, inputs):
    model = HookedDiT(dit)
    with pytest.raises(RuntimeError, match="from inside one of its own hooks"):
        model.run_with_hooks(
            *inputs, fwd_hooks=[("hook_embed", lambda a, hook: model(*inputs) and None)]
        )
    with dit_lens.trace(model) as t:
        model(*inputs)
        with pytest.raises(RuntimeError, match="can't be recomputed inside a hook"):
            model.run_with_hooks(
                *inputs, fwd_hooks=[("hook_embed", lambda a, hook: t["resid_post", 0] and None)]
            )
        model(*inputs)
    assert len(t.steps) == 2 and torch.equal(t["hook_sample"][0], t["hook_sample"][1])


def test_an_edit_after_the_run_is_refused(pipe, tmp_path):
    with dit_lens.trace(pipe) as t:
        run(pipe)
    with dit_lens.trace(pipe) as empty:
        pass
    found = dit_lens.load_trace(t.save(tmp_path / "t"), pipe)
    for over in (t, empty, found):
        attempts = [
            lambda over=over: over.edit("hook_embed", lambda a, hook: a),
            lambda over=over: over.patch("hook_embed", t),
            lambda over=over: over.ablate("attn_out", steps=[0]),
            lambda over=over: over.steer("attn_out", torch.zeros(16)),
            lambda over=over: over.hold("attn_out", steps=[1]),
            lambda over=over: over.load_edits(tmp_path / "none"),
        ]
        for attempt in attempts:
            with pytest.raises(RuntimeError, match="The run of this trace is over, and an edit wo"):
                attempt()


def test_foreign_hooks_stay(pipe):
    calls = []
    theirs = pipe.transformer.transformer_blocks[0].attn1.register_forward_hook(
        lambda m, i, o: calls.append(1)
    )
    model = HookedDiT(pipe)
    mine = model.add_hook("hook_embed", lambda a, hook: None)
    with dit_lens.trace(model):
        run(pipe)
    assert len(calls) == STEPS and model.instrumentation.listening == 1
    mine[0].remove()
    model.remove()
    run(pipe)
    assert len(calls) == 2 * STEPS
    theirs.remove()


def test_save_and_load(pipe, tmp_path):
    with dit_lens.trace(pipe, names="blocks.*.hook_resid_post", steps=slice(1, 3)) as t:
        run(pipe)
    path = t.save(tmp_path / "run.safetensors")
    alone = dit_lens.load_trace(path)
    assert (
        torch.equal(alone["resid_post", 1], t["resid_post", 1]) and len(alone["resid_post", 1]) == 2
    )
    with pytest.raises(RuntimeError, match="load the trace with its model"):
        alone["hook_embed"]
    again = dit_lens.load_trace(path, pipe)
    assert torch.equal(again["q", 2], t["q", 2])
    with pytest.raises(ValueError, match="another model, .*: its n_layers is 3, this one's 2"):
        dit_lens.load_trace(path, make_dit(layers=2))
    pipe.transformer.proj_out_1.bias.data += 1
    assert torch.equal(dit_lens.load_trace(path, pipe)["k", 2], t["k", 2])
    with pytest.raises(dit_lens.NotReproduced, match="from the output on"):
        dit_lens.load_trace(path, pipe)["hook_sample"]
    pipe.transformer.proj_out_1.bias.data -= 1

    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut' is damaged: it is not what was written"):
        dit_lens.load_trace(tmp_path / "cut")
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="pickle.pt' has no seal of this version"):
        dit_lens.load_trace(tmp_path / "pickle.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other' has no seal of this version .*; expected a trace"):
        dit_lens.load_trace(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="There is no file .*nowhere'; expected a trace"):
        dit_lens.load_trace(tmp_path / "nowhere")


def test_a_saved_trace_is_read_in_its_own_dtype(pipe, tmp_path):
    with dit_lens.trace(pipe, dtype=torch.float16) as t:
        pipe(class_labels=[3], num_inference_steps=2, output_type="np")
    again = dit_lens.load_trace(t.save(tmp_path / "t.safetensors"), pipe)
    assert again["resid_post", 1].dtype == torch.float16
    assert torch.equal(again["resid_post", 1], t["resid_post", 1])


def test_a_saved_edit_is_not_forgotten(pipe, tmp_path):
    with dit_lens.trace(pipe, names="hook_embed") as t:
        t.ablate("blocks.1.hook_attn_out")
        run(pipe)
    again = dit_lens.load_trace(t.save(tmp_path / "t"), pipe)
    assert torch.equal(again["hook_embed"], t["hook_embed"])
    with pytest.raises(
        RuntimeError,
        match="edited at 'blocks.1.hook_attn_out' by a function that the file can't hold",
    ):
        again["resid_post", 1]


def test_xarray(pipe):
    with dit_lens.trace(HookedDiT(pipe)) as t:
        run(pipe)
    ds = t.to_xarray(["resid_post", "attn.hook_pattern", "hook_embed"], steps=[0, 3])
    assert ds["hook_resid_post"].dims == ("layer", "step", "batch", "token", "d_model")
    assert ds["attn.hook_pattern"].dims == ("layer", "step", "batch", "head", "query", "key")
    assert list(ds.branch.values) == ["cond", "cond", "uncond", "uncond"] and list(
        ds.label.values
    ) == [
        3,
        5,
        1000,
        1000,
    ]
    assert list(ds.step.values) == [0, 3] and ds.timestep.values[0] == float(t.timesteps[0])
    assert (
        ds["hook_resid_post"].sel(layer=1, step=3).values == t["resid_post", 1][3].numpy()
    ).all()
    assert ds.log_snr.values[0] < ds.log_snr.values[1]
    with pytest.raises(ValueError, match="No names were recorded"):
        t.to_xarray()


def test_coordinates_of_several_runs_are_those_of_each(pipe):
    model = HookedDiT(pipe)
    with dit_lens.trace(model) as t:
        for labels, guidance in (([1, 2], 1.0), ([3], 4.0), ([4, 5], 1.0)):
            dit_lens.sample(model, labels, steps=2, guidance=guidance)
    ds = t.to_xarray("hook_embed")
    assert ds.label.dims == ds.branch.dims == ("step", "batch") and ds.twin.dims == ("batch",)
    assert ds.label.values[::2].tolist() == [[1, 2], [3, 1000], [4, 5]]
    assert ds.branch.sel(step=2).values.tolist() == ["cond", "uncond"]
    assert ds.branch.sel(step=5).values.tolist() == ["cond", "cond"]
    assert t.to_xarray("hook_embed", steps=[2, 3]).label.dims == ("batch",)


def test_steps_device_and_dtype(pipe):
    with dit_lens.trace(pipe, names="resid_post", steps=range(0, 4, 2), dtype=torch.float16) as t:
        run(pipe)
    assert t["resid_post", 0].dtype == torch.float16 and len(t["resid_post", 0]) == 2
    with dit_lens.trace(pipe, names="resid_post", steps=9) as t:
        run(pipe)
    with pytest.raises(ValueError, match="No step matches 9; the trace has 4 steps, 0 to 3"):
        t["resid_post", 0]
    with pytest.raises(
        ValueError, match=r"steps\[0\]=-1 can't be used; expected a whole number of 0"
    ):
        dit_lens.trace(pipe, steps=[-1])
    with (
        pytest.warns(UserWarning, match="never acted: the run had 4 steps, 0 to 3"),
        dit_lens.trace(pipe) as t,
    ):
        t.edit("hook_embed", lambda a, hook: None, steps=50)
        run(pipe)


@pytest.mark.parametrize("branches", [["both"], ["cond", "uncond"]])
def test_branches_that_are_counted_as_steps_are_warned_of(pipe, branches, recwarn):
    x, labels = torch.randn(2, 4, 8, 8), {"both": [1, 1000], "cond": [1, 2], "uncond": [1000] * 2}
    with dit_lens.trace(pipe) as t:
        t.ablate("blocks.1.hook_attn_out", steps=[1])
        for time in (750, 500, 250):
            for branch in branches:
                y = torch.tensor(labels[branch])
                pipe.transformer(x, timestep=torch.tensor([time] * 2), class_labels=y)
    said = [str(each.message) for each in recwarn if "counted calls" in str(each.message)]
    assert len(said) == len(branches) - 1
    assert all("calls 0 and 1 are given one x_t at one timestep" in each for each in said)


def test_an_edit_that_acted_in_no_step_of_two_runs_is_warned_of(pipe):
    with (
        pytest.warns(UserWarning, match="never acted: the run had 4 steps, 0 to 3"),
        dit_lens.trace(pipe) as t,
    ):
        t.edit("hook_embed", lambda a, hook: None, steps=5)
        run(pipe)
        run(pipe)


def test_of_a_run_that_was_broken_off_no_edit_is_said_to_be_idle(pipe, recwarn):
    def refuse(a, hook):
        raise InvalidState("enough")

    with pytest.raises(InvalidState, match="enough"), dit_lens.trace(pipe) as t:
        t.edit("hook_embed", refuse, steps=0)
        t.edit("hook_embed", lambda a, hook: None, steps=3)
        run(pipe)
    assert not [each for each in recwarn if "never acted" in str(each.message)]


def test_of_two_runs_in_a_trace_the_steps_count_on(pipe):
    acted = []
    with dit_lens.trace(pipe) as t:
        t.edit("hook_embed", lambda a, hook: acted.append(hook.step), steps=[1, 2])
        run(pipe)
        run(pipe)
    assert t.steps == list(range(8)) and len(t["resid_post", 0]) == 8
    assert acted[:4] == [1, 2, 1, 2]


def test_bad_input(pipe, dit):
    from diffusers import UNet2DModel

    with pytest.raises(
        dit_lens.UnknownName,
        match="No hook point matches 'blocks.0.hook_resid_pots'; nearest: 'blocks.0.hook_resid_po",
    ):
        dit_lens.trace(pipe, names="blocks.0.hook_resid_pots")
    assert forwards(pipe.transformer) == []
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(
        TypeError,
        match="UNet2DModel is not a Diffusion Transformer that dit_lens can open by itself; it ",
    ):
        dit_lens.trace(unet)
    with pytest.raises(TypeError, match=r"str is neither a .*, or dit_lens.load\('digits'\)"):
        dit_lens.trace("digits")
    with pytest.raises(RuntimeError, match="train mode, where diffusers drops class labels"):
        dit_lens.trace(dit.train())
    assert forwards(dit) == []
    with pytest.raises(TypeError, match="is not a dit_lens.Probe"):
        dit_lens.trace(pipe, probes=["SpectralSplit"])


@pytest.mark.filterwarnings("ignore:.*has other noise levels")
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(1000, clip_sample=False, beta_schedule="squaredcos_cap_v2"),
        diffusers.DPMSolverMultistepScheduler(1000, use_karras_sigmas=True),
    ],
)
def test_noise_levels_are_those_of_the_runs_own_scheduler(pipe, tmp_path, scheduler):
    """The model's own may have others at the same timesteps."""
    model = dit_lens.HookedDiT(pipe)
    with dit_lens.trace(model) as t:
        run = dit_lens.sample(model, [3], steps=4, scheduler=scheduler)
    loaded = dit_lens.load_trace(t.save(tmp_path / "t.safetensors"), model)
    for each in (t, loaded):
        found = torch.from_numpy(each.to_xarray("hook_embed").log_snr.values)
        torch.testing.assert_close(found, run.log_snr, rtol=1e-5, atol=1e-5)


def test_what_comes_after_an_activation_changes_no_record_of_it(dit, inputs):
    """A steering hook of PyTorch's, which changes a block's stream in place, and an edit that
    returns the same memory at every step.
    """
    x, t, y = inputs
    room = torch.empty(0)

    def into_room(a, hook):
        room.resize_(a.shape)
        return torch.mul(a, 2, out=room)

    handle = dit.transformer_blocks[0].register_forward_hook(lambda m, args, out: out.add_(1.0))
    names = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
    with torch.no_grad(), dit_lens.trace(dit, names=names) as eager, dit_lens.trace(dit) as lazy:
        for each in (eager, lazy):
            each.edit(names[1], into_room)
        for scale in (1.0, 3.0):
            dit(scale * x, t, class_labels=y)
    for name in names:
        assert torch.equal(eager[name], lazy[name]) and torch.equal(
            lazy.get(name)[name], lazy[name]
        )
        assert not torch.equal(eager[name][0], eager[name][1])
    assert torch.equal(eager["blocks.0.hook_resid_post"] + 1.0, lazy["blocks.1.hook_resid_pre"])
    handle.remove()


@pytest.mark.parametrize("batch", [None, 2])
def test_guidance_in_our_loop_says_which_half_is_which(pipe, batch):
    """The null class may be asked for: its item has a half of either kind all the same."""

    class Branches(dit_lens.Probe):
        names = "blocks.0.hook_resid_post"
        in_parts = True

        def start(self, model):
            self.seen = []

        def observe(self, activation, site):
            self.seen.append(site.branch)

    model, probe = HookedDiT(pipe), Branches()
    with dit_lens.trace(model, probes=[probe]) as t:
        run = dit_lens.sample(model, [1, 1000, 3], steps=2, guidance=3.0, batch=batch)
    items = 3 if batch is None else 1
    assert set(probe.seen) == {("cond",) * items + ("uncond",) * items}
    name = "blocks.0.hook_resid_post"
    halves = [t.get(name, branch=branch)[name] for branch in ("cond", "uncond")]
    assert torch.equal(torch.cat(halves, 1), t[name]) and halves[0].shape[1] == 3
    data = t.to_xarray("resid_post")
    assert list(data.branch.values) == ["cond"] * 3 + ["uncond"] * 3
    with dit_lens.trace(model) as u:
        run.forward(1)
    assert torch.equal(u.get(name, branch="cond")[name][0], halves[0][1])


def test_items_at_different_times_have_their_own_timesteps(tmp_path):
    model = HookedDiT(make_dit(), scheduler=DDIMScheduler(1000))
    x, t, y = (
        torch.randn(2, *model.cfg.latent_shape),
        torch.tensor([500, 300]),
        torch.tensor([1, 2]),
    )
    with dit_lens.trace(model) as trace:
        model(x, t, y)
        model(x, t[:1], y)
    assert trace.timesteps.tolist() == [[500, 300], [500, 500]]
    trace.save(tmp_path / "t.safetensors")
    for each in (trace, dit_lens.load_trace(tmp_path / "t.safetensors", model)):
        found = each.to_xarray("blocks.0.hook_resid_post")
        assert found.timestep.dims == ("step", "batch") and "log_snr" not in found.coords
        assert found.timestep.values.tolist() == [[500, 300], [500, 500]]
    with dit_lens.trace(model) as trace:
        model(x, t[:1], y)
    assert trace.timesteps.tolist() == [500]
    assert trace.to_xarray("blocks.0.hook_resid_post").log_snr.dims == ("step",)
    assert dit_lens.trace(model).timesteps.tolist() == []
