"""The bridge to nnsight, against nnsight itself on an untouched copy, and against dit_lens without
it: bit for bit.
"""

import copy
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dit, make_pipe
from nnsight import NNsight
from nnsight import save as keep

import dit_lens
from dit_lens import HookedDiT
from dit_lens.bridges import nnsight as bridge
from dit_lens.bridges.nnsight import to_nnsight
from dit_lens.hooks.points import HookPoint

ROOT = Path(__file__).parent.parent
STEPS = 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(**more):
    return {"num_inference_steps": STEPS, "output_type": "pt", **more}


def heads(x):
    return x.unflatten(2, (2, 8))


@pytest.fixture
def model(dit):
    return HookedDiT(dit)


@pytest.fixture
def m(model):
    return to_nnsight(model)


def untouched(model):
    return (
        model.instrumentation.listening == 0
        and model.instrumentation.owner is None
        and not model.transformer._forward_hooks
    )


# Against nnsight itself.


def test_values_are_those_of_nnsight_on_the_unwrapped_model(inputs):
    x, t, y = inputs
    plain, m = NNsight(make_dit()), to_nnsight(make_dit())
    theirs, ours = {}, {}
    with plain.trace(x, timestep=t, class_labels=y, return_dict=False):
        theirs["hook_embed"] = plain.pos_embed.output
        for i in range(3):
            block, at = plain.transformer_blocks[i], f"blocks.{i}."
            theirs[at + "hook_resid_pre"] = block.input
            theirs[at + "hook_cond"] = block.norm1.emb.output
            theirs[at + "ln1.hook_normalized"] = block.norm1.norm.output
            theirs[at + "attn.hook_in"] = block.norm1.output[0]
            theirs[at + "attn.hook_q"] = heads(block.attn1.to_q.output)
            theirs[at + "attn.hook_k"] = heads(block.attn1.to_k.output)
            theirs[at + "attn.hook_v"] = heads(block.attn1.to_v.output)
            theirs[at + "attn.hook_z"] = heads(block.attn1.to_out[0].input)
            theirs[at + "attn.hook_out"] = block.attn1.output
            theirs[at + "ln2.hook_normalized"] = block.norm3.output
            theirs[at + "mlp.hook_in"] = block.ff.input
            theirs[at + "mlp.hook_pre"] = block.ff.net[0].proj.output
            theirs[at + "mlp.hook_post"] = block.ff.net[0].output
            theirs[at + "mlp.hook_out"] = block.ff.output
            theirs[at + "hook_resid_post"] = block.output
        theirs["ln_final.hook_normalized"] = plain.norm_out.output
        theirs["final.hook_out"] = plain.proj_out_2.output
        theirs["hook_sample"] = plain.output[0]
        keep(theirs)
    with m.trace(x, t, y):
        for name in theirs:
            ours[name] = m.get(name).output
        output = m.output.save()
        keep(ours)
    assert len(ours) == 3 * 15 + 4 and torch.equal(output, theirs["hook_sample"])
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_edits_do_what_they_do_in_nnsight(inputs):
    x, t, y = inputs
    plain, m = NNsight(make_dit()), to_nnsight(make_dit())
    with plain.trace(x, timestep=t, class_labels=y, return_dict=False):
        plain.transformer_blocks[0].attn1.to_v.output[:, :3] = 0
        plain.transformer_blocks[1].output = plain.transformer_blocks[1].output * 0.5
        theirs = plain.output[0].save()
    with m.trace(x, t, y):
        m.blocks[0].attn.hook_v.output[:, :3] = 0
        m.blocks[1].hook_resid_post.output = m.blocks[1].hook_resid_post.output * 0.5
        ours = m.output.save()
    assert torch.equal(ours, theirs)


def test_steps_of_a_pipeline_are_those_of_nnsight():
    theirs_pipe, ours_pipe = make_pipe(), make_pipe()
    plain, m = NNsight(theirs_pipe.transformer), to_nnsight(ours_pipe)
    with plain.trace(
        fn=theirs_pipe.__call__, class_labels=[3, 5], generator=seeded(), **settings()
    ) as tracer:
        theirs = keep([])
        for step in tracer.iter[:STEPS]:
            if step == 2:
                plain.transformer_blocks[0].output[:] = 0
            theirs.append(plain.transformer_blocks[1].attn1.output)
        images = tracer.result.images.save()
    with m.generate(class_labels=[3, 5], generator=seeded(), **settings()) as tracer:
        ours = keep([])
        for step in tracer.iter[:STEPS]:
            if step == 2:
                m.blocks[0].hook_resid_post.output[:] = 0
            ours.append(m.blocks[1].attn.hook_out.output)
        ours_images = m.output.images.save()
    assert len(ours) == STEPS and torch.equal(ours_images, images)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Against dit_lens without nnsight.


def test_every_name_has_the_value_of_run_with_cache(model, m, inputs):
    out, cache = model.run_with_cache(*inputs)
    with m.trace(*inputs):
        seen = keep({})
        for name in model.names:
            seen[name] = m.get(name).output
        output = m.output.save()
    assert list(seen) == list(cache) and torch.equal(output, out)
    for name, value in cache.items():
        assert torch.equal(seen[name], value), name
    with m.trace(*inputs) as tracer:
        cached = tracer.cache(include_inputs=True)
    for name, value in cache.items():
        assert torch.equal(cached[f"model.{name}"].output, value) and torch.equal(
            cached[f"model.{name}"].input, value
        )
    assert torch.equal(m.trace(*inputs, trace=False), out) and torch.equal(m(*inputs), out)
    assert untouched(model)


def test_every_name_can_be_edited(model, m, inputs):
    """Two blocks' worth of editing in place, by assignment, through `.input` and `.inputs`, and by
    `.skip`, against run_with_hooks.
    """
    names = [n for n in model.names if not n.startswith(("blocks.1", "blocks.2"))]
    for i, name in enumerate(names):
        expected = model.run_with_hooks(*inputs, fwd_hooks=[(name, lambda a, hook: a * 0.5)])
        point = m.get(name)
        if i % 5 == 0:
            with m.trace(*inputs):
                point.output[:] *= 0.5
                out = m.output.save()
        elif i % 5 == 1:
            with m.trace(*inputs):
                point.output = point.output * 0.5
                out = m.output.save()
        elif i % 5 == 2:
            with m.trace(*inputs):
                point.input = point.input * 0.5
                out = m.output.save()
        elif i % 5 == 3:
            with m.trace(*inputs):
                (value,), _ = point.inputs
                point.inputs = ((value * 0.5,), {})
                out = m.output.save()
        else:
            with m.trace(*inputs):
                point.skip(point.input * 0.5)
                out = m.output.save()
        assert torch.equal(out, expected), name
        assert not torch.equal(out, model(*inputs)), name


def test_patterns_edited_in_every_mode(model, m, inputs):
    """An edit in place of a pattern is seen even where tensors count no edits, and a mere read
    changes no bit.
    """
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            plain = model(*inputs)
            expected = model.run_with_hooks(
                *inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda a, hook: a * 0)]
            )
            with m.trace(*inputs):
                m.blocks[1].attn.hook_pattern.output.mul_(0)
                out = m.output.save()
            with m.trace(*inputs):
                pattern = m.blocks[1].attn.hook_pattern.output.save()
                read = m.output.save()
        assert torch.equal(out, expected) and torch.equal(read, plain)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 2, 16))


def test_what_was_saved_stays_as_it_was(model, m, inputs):
    """resid_post of a block and resid_pre of the next are one tensor in the model, and two here."""
    _, cache = model.run_with_cache(*inputs)
    with m.trace(*inputs):
        post = m.blocks[0].hook_resid_post.output.save()
        m.blocks[1].hook_resid_pre.output[:] = 0
    assert torch.equal(post, cache["resid_post", 0])


def test_gradients(model, m, inputs):
    name = "blocks.1.hook_resid_mid"
    got = []
    with model.hooks(bwd_hooks=[(name, lambda g, hook: got.append(g))]):
        model(*inputs).sum().backward()
    with m.trace(*inputs):
        mid = m.blocks[1].hook_resid_mid.output
        loss = m.output.sum()
        with loss.backward():
            grad = mid.grad.save()
    assert torch.equal(grad, got[0])


def test_stored_edits_sessions_and_stop(model, m, inputs):
    expected = model.run_with_hooks(
        *inputs, fwd_hooks=[("blocks.0.hook_mlp_out", lambda a, hook: a * 0)]
    )
    with m.edit() as (tracer, edited):
        edited.blocks[0].hook_mlp_out.output[:] = 0
    with edited.trace(*inputs):
        out = m.output.save()
    with m.trace(*inputs):
        plain = m.output.save()
    assert torch.equal(out, expected) and torch.equal(plain, model(*inputs))
    ran = []
    handle = model.transformer.transformer_blocks[2].register_forward_hook(lambda *_: ran.append(1))
    with m.session():
        with m.trace(*inputs) as tracer:
            stream = m.blocks[1].hook_resid_post.output.save()
            tracer.stop()
        with m.trace(*inputs):
            m.blocks[1].hook_resid_pre.output = stream
            twice = m.output.save()
    handle.remove()
    assert ran == [1] and untouched(model)
    expected = model.run_with_hooks(
        *inputs, fwd_hooks=[("blocks.1.hook_resid_pre", lambda a, hook: stream)]
    )
    assert torch.equal(twice, expected)


def test_the_lens_inside_a_trace(model, m, inputs):
    x, t, y = inputs
    with m.trace(x, t, y):
        early = m.dit.unembed(m.blocks[1].hook_resid_post.output, t, y).save()
    _, cache = model.run_with_cache(x, t, y)
    assert torch.equal(early, model.unembed(cache["resid_post", 1], t, y))


# Denoising steps.


def test_steps_equal_a_trace_bit_for_bit(pipe):
    run = {"class_labels": [3, 5], **settings()}
    names = [
        "blocks.0.hook_resid_post",
        "blocks.1.attn.hook_pattern",
        "blocks.2.adaln.hook_gate_mlp",
        "hook_sample",
    ]
    with dit_lens.trace(pipe, names=names) as t:
        images = pipe(**run, generator=seeded()).images
    m = to_nnsight(pipe)
    with m.generate(**run, generator=seeded()) as tracer:
        seen = keep({name: [] for name in names})
        for _ in tracer.iter[:STEPS]:
            for name in names:
                seen[name].append(m.get(name).output)
        ours = m.output.images.save()
    assert torch.equal(ours, images)
    for name in names:
        assert torch.equal(torch.stack(seen[name]), t[name]), name
    assert torch.equal(m.generate(**run, generator=seeded()).images, images) and untouched(m.dit)
    with dit_lens.trace(m.dit) as lazy, pytest.warns(UserWarning, match="ends this way by design"):
        # a loop without an end runs as far as the pipeline does
        with m.trace(**run, generator=seeded()) as tracer:
            got = keep([])
            for _ in tracer.all():
                got.append(m.hook_sample.output)
    assert torch.equal(torch.stack(got), t["hook_sample"]) and torch.equal(
        lazy["hook_sample"], t["hook_sample"]
    )


def test_a_step_is_counted_also_where_nobody_listened(pipe):
    run = {"class_labels": [3], **settings()}
    m = to_nnsight(pipe)
    with dit_lens.trace(m.dit, names="*") as t:
        pipe(**run, generator=seeded())
    with m.generate(**run, generator=seeded()) as tracer:
        for _ in tracer.iter[1]:
            early = m.blocks[0].hook_mlp_out.output.save()
        for _ in tracer.iter[3]:
            scores = m.blocks[2].attn.hook_attn_scores.output.save()
            late = m.blocks[2].hook_mlp_out.output.save()
    assert torch.equal(early, t["mlp_out", 0][1]) and torch.equal(late, t["mlp_out", 2][3])
    assert torch.equal(scores, t["attn_scores", 2][3])
    # and what was passed is passed, not found a step later
    with pytest.raises(Exception, match="already ran past it"):
        with m.generate(**run, generator=seeded()):
            m.blocks[2].hook_mlp_out.output.save()
            m.blocks[0].attn.hook_pattern.output.save()
    assert untouched(m.dit)


def test_an_edit_at_one_step_equals_the_traces(pipe):
    run = {"class_labels": [3], **settings()}
    name = "blocks.1.attn.hook_pattern"
    with dit_lens.trace(pipe) as t:
        t.edit(name, lambda a, hook: a * 0, steps=2)
        images = pipe(**run, generator=seeded()).images
    m = to_nnsight(pipe)
    with m.generate(**run, generator=seeded()) as tracer:
        for _ in tracer.iter[2]:
            m.get(name).output[:] = 0
        ours = m.output.images.save()
    assert torch.equal(ours, images)


def test_only_what_is_read_is_listened_to(pipe, monkeypatch):
    """Scores, patterns and per-head results are computed for listeners; whoever reads other names
    must not pay for them.
    """
    listened = []
    add = HookPoint.add
    monkeypatch.setattr(
        HookPoint, "add", lambda point, who: (listened.append(point.name), add(point, who))[1]
    )
    m = to_nnsight(pipe)
    with m.generate(class_labels=[3], generator=seeded(), **settings()) as tracer:
        m.blocks[1].hook_resid_post.output.save()
        m.blocks[2].attn.hook_q.output.save()
        for _ in tracer.iter[3]:
            m.blocks[0].attn.hook_pattern.output.save()
            left = keep([name for name, point in m.dit.hook_dict.items() if point.listeners])
    assert listened == [
        "blocks.1.hook_resid_post",
        "blocks.2.attn.hook_q",
        "blocks.0.attn.hook_pattern",
    ]
    assert left == ["blocks.0.attn.hook_pattern"] and untouched(m.dit)


# Several invokes.


def test_invokes_are_one_batch(model, m, inputs):
    x, t, y = inputs
    out, cache = model.run_with_cache(x, t, y)
    with m.trace() as tracer:
        with tracer.invoke(x[:1], t[:1], y[:1]):
            first = m.blocks[1].attn.hook_q.output.save()
        with tracer.invoke(x=x[1:], t=t[1:], y=y[1:]):
            second = m.blocks[1].attn.hook_q.output.save()
            one = m.output.save()
        with tracer.invoke():
            whole = m.output.save()
    assert torch.equal(torch.cat([first, second]), cache["q", 1])
    assert torch.equal(whole, out) and torch.equal(one, out[1:])
    for i in range(2):  # run apart, a matrix product of another size may round otherwise
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], y[i : i + 1]), out[i : i + 1])


def test_an_edit_reaches_its_own_rows(model, m, inputs):
    x, t, y = inputs

    def halve_second(a, hook):
        a[1] *= 0.5
        return a

    expected = model.run_with_hooks(x, t, y, fwd_hooks=[("blocks.0.hook_attn_out", halve_second)])
    with m.trace() as tracer:
        with tracer.invoke(x[:1], t[:1], y[:1]):
            first = m.output.save()
        with tracer.invoke(x[1:], t[1:], y[1:]):
            m.blocks[0].hook_attn_out.output[:] *= 0.5
            second = m.output.save()
    assert torch.equal(torch.cat([first, second]), expected)


def test_one_invoke_patches_another(model, m, inputs):
    x, t, y = inputs

    def swap(a, hook):
        return a.clone().index_copy(0, torch.tensor([1]), a[:1])

    expected = model.run_with_hooks(x, t, y, fwd_hooks=[("blocks.1.hook_mlp_out", swap)])
    with m.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(x[:1], t[:1], y[:1]):
            source = m.blocks[1].hook_mlp_out.output
            barrier()
        with tracer.invoke(x[1:], t[1:], y[1:]):
            barrier()
            m.blocks[1].hook_mlp_out.output = source
        with tracer.invoke():
            out = m.output.save()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_invokes_of_a_pipeline(pipe, guidance):
    """Each invoke has its images' rows of both halves, reads and edits them, in place too, and gets
    its images.
    """
    shared = settings(guidance_scale=guidance)
    labels, gens = [3, 5, 7], [seeded(i) for i in range(3)]
    halves = 2 if guidance > 1 else 1

    def edit(a, hook):
        a.view(halves, 3, *a.shape[1:])[:, 1:] *= 0.5
        return a

    with dit_lens.trace(pipe, names=["blocks.1.hook_resid_pre"]) as t:
        t.edit("blocks.0.hook_mlp_out", edit, steps=1)
        t.edit("blocks.0.hook_resid_post", edit, steps=1)
        images = pipe(labels, generator=gens, **shared).images
    m = to_nnsight(pipe)
    with m.generate(**shared) as tracer:
        with tracer.invoke([3], generator=seeded(0)):
            first = keep([])
            for _ in tracer.iter[:STEPS]:
                first.append(m.blocks[1].hook_resid_pre.output)
            one = m.output.images.save()
        with tracer.invoke(class_labels=[5, 7], generator=[seeded(1), seeded(2)]):
            second = keep([])
            for step in tracer.iter[:STEPS]:
                if step == 1:
                    m.blocks[0].hook_mlp_out.output[:] *= 0.5
                    m.blocks[0].hook_resid_post.output = m.blocks[0].hook_resid_post.output * 0.5
                second.append(m.blocks[1].hook_resid_pre.output)
            two = tracer.result.images.save()
    assert torch.equal(torch.cat([one, two]), images)
    first, second = (torch.stack(s).unflatten(1, (halves, -1)) for s in (first, second))
    assert torch.equal(torch.cat([first, second], 2).flatten(1, 2), t["blocks.1.hook_resid_pre"])


def test_images_of_every_kind_are_shared_out(pipe):
    m = to_nnsight(pipe)
    for kind in ("pil", "np"):
        with m.generate(num_inference_steps=1, output_type=kind) as tracer:
            with tracer.invoke([3]):
                one = m.output.images.save()
            with tracer.invoke([5, 7]):
                two = m.output.images.save()
        assert len(one) == 1 and len(two) == 2


def test_in_place_edits_under_guidance_are_seen_by_who_reads_next(pipe):
    m = to_nnsight(pipe)
    with m.generate(num_inference_steps=1, output_type="pt") as tracer:
        with tracer.invoke([3]):
            m.hook_embed.output[:] = 1
            again = m.hook_embed.output.save()
        with tracer.invoke([5]):
            m.hook_embed.output[:] = 2
        with tracer.invoke():
            whole = m.hook_embed.output.save()
    assert torch.all(again == 1)
    assert whole[:, 0, 0].tolist() == [1, 2, 1, 2]


# What is left behind, and what is refused.


def test_nothing_is_left_behind(inputs):
    dit = make_dit()
    before = copy.deepcopy(dit)(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample
    m = to_nnsight(dit)
    with m.trace(*inputs):
        m.blocks[0].hook_resid_post.output[:] = 0
    assert m.device == torch.device("cpu") and m.to(torch.float64).dit.dtype == torch.float64
    m.to(torch.float32)
    m.dit.remove()
    assert [n for n, module in dit.named_modules() if "forward" in module.__dict__] == []
    assert torch.equal(dit(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample, before)
    with pytest.raises(RuntimeError, match="hook points were removed"):
        with m.trace(*inputs):
            m.hook_embed.output.save()
    assert not m.interleaver.interleaving


def test_an_exception_leaves_no_listeners(model, m, pipe, inputs):
    x, t, y = inputs
    plain = model(x, t, y)
    for breaks in (lambda a: 1 / 0, lambda a: a.nonsense, lambda a: a @ a.new_zeros(3, 3)):
        with pytest.raises(Exception, match="division|nonsense|mat1|size|shape"):
            with m.trace(x, t, y):
                breaks(m.blocks[1].hook_resid_post.output)
        assert untouched(model) and torch.equal(model(x, t, y), plain)
    with pytest.raises(ValueError, match=r"shape \[1\]; expected \[2, 16, 16\]"):
        with m.trace(x, t, y):
            m.blocks[1].hook_resid_post.output = torch.zeros(1)
    # the model's own refusals come through
    with pytest.raises(ValueError, match="The latents have shape"):
        with m.trace(x[:, :2], t, y):
            m.blocks[1].hook_resid_post.output.save()
    with pytest.raises(Exception, match="already ran past it"):
        with m.trace(x, t, y):
            m.blocks[1].hook_resid_post.output.save()
            m.blocks[0].hook_resid_post.output.save()
    p = to_nnsight(pipe)
    with pytest.raises(ZeroDivisionError):
        with p.generate(class_labels=[3], **settings()) as tracer:
            for step in tracer.iter[:STEPS]:
                p.hook_sample.output.mul_(1 / (2 - step))
    assert untouched(model) and untouched(p.dit) and not p.interleaver.interleaving
    with m.trace(x, t, y):
        out = m.output.save()
    assert torch.equal(out, plain)


def test_clear_sentences(model, m, pipe, inputs):
    with pytest.raises(
        AttributeError, match="model.blocks.1 has no 'hook_resid_pots'; nearest: 'hook_resid_post'"
    ):
        _ = m.blocks[1].hook_resid_pots
    with pytest.raises(
        TypeError,
        match=r"unexpected keyword argument 'class_labels'.*give to_nnsight the pipeline itself",
    ):
        with m.generate(class_labels=[3]):
            m.hook_embed.output.save()
    with pytest.raises(
        ValueError,
        match=r"The invokes differ in guidance_scale \(1.0, 4.0\), and one batch has one",
    ):
        p = to_nnsight(pipe)
        with p.generate() as tracer:
            with tracer.invoke([3], guidance_scale=1.0):
                p.hook_embed.output.save()
            with tracer.invoke([4], guidance_scale=4.0):
                p.hook_embed.output.save()
    with pytest.raises(
        ValueError, match="A pipeline's output can't be replaced for one of several invokes"
    ):
        with p.generate(num_inference_steps=1) as tracer:
            with tracer.invoke([3]):
                p.output = p.output
            with tracer.invoke([4]):
                p.hook_embed.output.save()
    with pytest.raises(RuntimeError, match="nnsight edited 'hook_embed' inside a dit_lens.trace"):
        with dit_lens.trace(model):
            with m.trace(*inputs):
                m.hook_embed.output[:] = 0
    model.transformer.train()
    with pytest.raises(RuntimeError, match="train mode"):
        with m.trace(*inputs):
            m.hook_embed.output.save()
    model.transformer.eval()
    with pytest.raises(TypeError, match="neither a transformer nor a pipeline"):
        to_nnsight("digits")
    assert untouched(model)


def test_nnsight_is_missed_politely(monkeypatch):
    bridge._nnsight_classes.cache_clear()
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(ImportError, match=r"pip install 'dit_lens\[nnsight\]'"):
        to_nnsight(make_dit())


def test_the_page_runs(tmp_path, capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "nnsight.md").read_text(), re.S)
    # nnsight reads the source of its with blocks
    (tmp_path / "page.py").write_text("\n".join(code))
    runpy.run_path(str(tmp_path / "page.py"))
    assert capsys.readouterr().out.endswith("True\n")
