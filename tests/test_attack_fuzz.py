"""Random sequences of interferences around a traced run: every lazy read is bit for bit what an
eager record of the same run has, or it says that it is not.
"""

import contextlib
import os
import warnings

import hypothesis.strategies as st
import torch
from conftest import make_dit, raw
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, Phase, given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_lens
from dit_lens import HookedDiT, NotReproduced

CASES = int(os.environ.get("DIT_LENS_ATTACK_FUZZ", "30"))
LAYER = st.integers(0, 2)
COUNTS = dict.fromkeys(("cases", "reads", "equal", "rounding", "refused", "silent wrong"), 0)


class World:
    """A model, the inputs of its next call, and what has to be undone in the end."""

    def __init__(self):
        self.dit = make_dit(seed=3)
        self.model = HookedDiT(self.dit, scheduler=DDIMScheduler(1000))
        gen = torch.Generator().manual_seed(4)
        self.x = torch.randn(2, 4, 8, 8, generator=gen)
        self.t, self.y = torch.tensor([700, 31]), torch.tensor([3, 1000])
        self.undo = contextlib.ExitStack()
        self.handles = []
        self.count = 0

    def block(self, layer):
        return self.dit.transformer_blocks[layer]


def base(linear):
    """A projection, under an adapter or not."""
    return getattr(linear, "base_layer", linear)


# What happens between calls. Each takes the world, a layer and a number.


def call(w, layer, n):
    with torch.no_grad():
        raw(w.dit, w.x, w.t, w.y)


def input_in_place(w, layer, n):
    w.x[0] += 0.1 * n


def input_by_data(w, layer, n):
    w.x.data.mul_(1 + 0.1 * n)


def time_in_place(w, layer, n):
    w.t[0] = (int(w.t[0]) + n) % 1000


def label_in_place(w, layer, n):
    w.y[1] = n


def weight_in_place(w, layer, n):
    with torch.no_grad():
        w.block(layer).ff.net[2].weight.mul_(1 + 0.1 * n)


def weight_by_data(w, layer, n):
    base(w.block(layer).attn1.to_v).weight.data[n] += 0.5


def weight_replaced(w, layer, n):
    base(w.block(layer).attn1.to_q).weight = torch.nn.Parameter(
        torch.randn(16, 16, generator=torch.Generator().manual_seed(n))
    )


def buffer(w, layer, n):
    w.dit.pos_embed.pos_embed.data.add_(0.01 * n)


def eps(w, layer, n):
    w.block(layer).norm3.eps = 0.1 * n


def module_hook(w, layer, n):
    handle = w.block(layer).ff.register_forward_hook(lambda m, args, out: out * (1 + 0.1 * n))
    w.handles.append(handle)


def module_pre_hook(w, layer, n):
    handle = w.block(layer).attn1.to_k.register_forward_pre_hook(lambda m, a: (a[0] + 0.1 * n,))
    w.handles.append(handle)


def module_hook_off(w, layer, n):
    if w.handles:
        w.handles.pop(n % len(w.handles)).remove()


def hook_on(w, layer, n):
    w.model.add_hook(("attn_out", layer), lambda a, hook: a * (1 + 0.1 * n))


def impure_hook_on(w, layer, n):
    def fn(a, hook):
        w.count += 1
        return a + 0.1 * w.count

    w.model.add_hook(("mlp_out", layer), fn)


def hooks_off(w, layer, n):
    w.model.reset_hooks()


def kernel(w, layer, n):
    w.undo.enter_context(sdpa_kernel(SDPBackend.MATH))


def matmul(w, layer, n):
    before = torch.get_float32_matmul_precision()
    w.undo.callback(torch.set_float32_matmul_precision, before)
    torch.set_float32_matmul_precision("medium")


def mkldnn(w, layer, n):
    w.undo.enter_context(torch.backends.mkldnn.flags(enabled=False))


def autocast(w, layer, n):
    with torch.autocast("cpu", torch.bfloat16):
        call(w, layer, n)


def inference_mode(w, layer, n):
    with torch.inference_mode():
        raw(w.dit, w.x, w.t, w.y)


def partial(w, layer, n):
    with torch.no_grad():
        w.model(w.x, w.t, w.y, stop_at_layer=layer)


def coupled(w, layer, n):
    from dit_lens.twinning.coupling import coupled as couple

    with couple(w.model, g=0.1 * n, layers=[layer]):
        call(w, layer, n)


def nested(w, layer, n):
    with dit_lens.trace(w.model) as t:
        call(w, layer, n)
    with contextlib.suppress(NotReproduced):
        t["resid_post", layer]


def sampled(w, layer, n):
    run = dit_lens.sample(w.model, [n], seeds=n, steps=2)
    with contextlib.suppress(NotReproduced):
        run.activations("resid_post", layer, step=1)


def wrong(w, layer, n):
    with contextlib.suppress(Exception):
        raw(w.dit, w.x[:, :3], w.t, w.y)


def train_and_back(w, layer, n):
    w.dit.train()
    w.dit.eval()


def cast_and_back(w, layer, n):
    for p in w.dit.parameters():
        p.data = p.data.to(torch.bfloat16).to(torch.float32)


def adapter(w, layer, n):
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    layers = [m for m in w.dit.modules() if isinstance(m, LoraLayer)]
    for each in layers:
        each.enable_adapters(n % 2 == 0)
    if not layers:
        torch.manual_seed(n)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        inject_adapter_in_model(config, w.dit)


ACTS = [
    call, input_in_place, input_by_data, time_in_place, label_in_place, weight_in_place,
    weight_by_data, weight_replaced, buffer, eps, module_hook, module_pre_hook, module_hook_off,
    hook_on, impure_hook_on, hooks_off, kernel, matmul, mkldnn, autocast, inference_mode, partial,
    coupled, nested, sampled, wrong, train_and_back, cast_and_back, adapter,
]  # fmt: skip
STEP = st.tuples(st.sampled_from(ACTS), LAYER, st.integers(1, 9))
EDIT = st.tuples(st.sampled_from(["attn_out", "q", "pattern", "resid_post"]), LAYER)
READ = st.sampled_from(["resid_post", "hook_embed", "attn.hook_q", "mlp.hook_post", "hook_sample"])


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(
    st.lists(STEP, min_size=1, max_size=6),
    st.lists(STEP, max_size=3),
    st.lists(EDIT, max_size=2),
    READ,
)
def test_a_lazy_read_is_the_record_or_says_so(inside, after, edits, site):
    COUNTS["cases"] += 1
    w = World()
    with w.undo, warnings.catch_warnings(record=True):
        with dit_lens.trace(w.model, names="*") as eager, dit_lens.trace(w.model) as lazy:
            for name, layer in edits:
                eager.edit((name, layer), lambda a, hook: a * (1 + 0.01 * hook.step))
            call(w, 0, 0)
            for act, layer, n in inside:
                act(w, layer, n)
            call(w, 0, 0)
        for act, layer, n in after:
            act(w, layer, n)
        assert lazy.steps == eager.steps
        for step in lazy.steps:
            compare(eager, lazy, site, step)
    w.model.reset_hooks()
    inst = w.model.instrumentation
    assert not inst.busy and not inst.running
    assert not any(point.attached for point in inst.points.values())


def compare(eager, lazy, site, step):
    """Each activation at one step, read both ways, in one pass and alone."""
    COUNTS["reads"] += 1
    names = [n for n in lazy.names if n.endswith(site)]
    want = {}
    for name in names:  # a pass that was stopped has not all of them
        with contextlib.suppress(dit_lens.errors.DitLensError):
            want |= eager.get([name], steps=step)
    if not want:
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            got = lazy.get(list(want), steps=step)
        except NotReproduced as error:
            assert f"Step {step} can't be recomputed" in str(error)
            COUNTS["refused"] += 1
            return
    if all(torch.equal(got[name], want[name]) for name in want):
        COUNTS["equal"] += 1
    elif any("to within rounding" in str(w.message) for w in said) or not lazy.exact:
        COUNTS["rounding"] += 1
    else:
        COUNTS["silent wrong"] += 1
        raise AssertionError(f"{site} at step {step} is silently another")


def test_counts():
    """Runs behind the fuzz test, in one process, and shows what it met."""
    print(", ".join(f"{n} {what}" for what, n in COUNTS.items()))
    assert COUNTS["silent wrong"] == 0
