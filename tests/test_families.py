"""Every family against the contract, and what must not be opened."""

import copy
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import make_dit
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch.testing._internal.two_tensor import TwoTensor

import dit_lens
from dit_lens import families
from dit_lens.families import Joint, JointPoint, family_named, flat, small_inputs
from dit_lens.families.registry import OURS
from dit_lens.families.upstream import digest
from dit_lens.hooks.points import BackwardEditor, Editor, HookPoint, Observer
from dit_lens.testing import family_contract as contract

NAMES = sorted(OURS)
DEVICE = os.environ.get("DIT_LENS_TEST_DEVICE", "cpu")
README = Path(dit_lens.__file__).parent.parent / "README.md"
FIRST = "DiTTransformer2DModel"  # the one family of `make quick`


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != FIRST)]
)
def test_contract(name):
    """And the family's row in the README is what the checker prints."""
    rows = contract.examine(name, device=DEVICE)
    failed = [f"{row.where}: {row.check}: {row.message}" for row in rows if not row.ok]
    assert not failed, "\n".join(failed)
    assert {row.where for row in rows} == {"small(0)", "small(1)", "small(2)", "pipeline"}
    *head, row = contract.markdown({name: rows}).splitlines()
    table = README.read_text().partition("\n".join(head))[2].partition("\n\n")[0]
    assert row in table.splitlines()


def test_the_readme_has_a_row_for_each_family():
    head = contract.markdown({}) + "\n"
    table = README.read_text().partition(head)[2].partition("\n\n")[0]
    assert [line.split("`")[1] for line in table.splitlines()] == NAMES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_bit_for_bit(name, dtype):
    family = family_named(name)
    for variant in range(3):
        plain, condition = family.small(variant)
        plain = plain.to(dtype)
        halved = type(condition)({k: _to(v, dtype) for k, v in condition.items()})
        inputs = small_inputs(family, plain, halved)
        opened = copy.deepcopy(plain)
        model = dit_lens.HookedDiT(opened)
        with torch.no_grad(), model.hooks([(None, lambda a, hook: None)]):
            got = flat(opened(**inputs, return_dict=False)[0])
            want = flat(plain(**inputs, return_dict=False)[0])
        assert got.dtype == dtype and torch.equal(got, want)


def _to(value, dtype):
    if isinstance(value, list):
        return [_to(v, dtype) for v in value]
    return (
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


@pytest.mark.slow
def test_the_checker_finds_what_is_wrong(monkeypatch):
    """Each fault by the check that is there for it."""
    from dit_lens.families import dit

    family = family_named("DiTTransformer2DModel")

    kept = "same_output names_in_order shapes_as_named edits_reach_the_stream sources_are_noted"
    checks = tuple(check for check in contract.CHECKS if check.__name__ in kept.split())
    monkeypatch.setattr(contract, "CHECKS", checks)  # the others take their time and find nothing

    def failing():
        return {row.check for row in contract.examine(family, where="small(1)") if not row.ok}

    assert failing() == set()
    whole = dit.DiTBlockForward.__call__

    # resid_mid is shown, and what it returns is thrown away
    def hooks_in_vain(self, *args, **kwargs):
        before = self.points
        in_vain = {"hook_resid_mid": lambda x: (before["hook_resid_mid"](x), x)[1]}
        self.points = before | in_vain
        try:
            return whole(self, *args, **kwargs)
        finally:
            self.points = before

    monkeypatch.setattr(dit.DiTBlockForward, "__call__", hooks_in_vain)
    assert "edits_reach_the_stream" in failing()
    monkeypatch.setattr(
        dit.DiTBlockForward, "__call__", lambda self, *a, **k: whole(self, *a, **k) * 1.0001
    )
    assert "same_output" in failing()
    monkeypatch.setattr(dit.DiTBlockForward, "__call__", whole)
    sites = dict(dit.BLOCK_SITES)
    monkeypatch.setattr(dit, "BLOCK_SITES", dict(reversed(sites.items())))
    assert "names_in_order" in failing()
    monkeypatch.setattr(dit, "BLOCK_SITES", sites | {"hook_q": ("batch", "d_model")})
    assert "names_in_order" in failing()
    monkeypatch.setattr(dit, "BLOCK_SITES", sites | {"hook_attn_out": ("batch", "token")})
    assert failing() == {"shapes_as_named"}
    monkeypatch.setattr(dit, "BLOCK_SITES", sites)
    monkeypatch.setattr(dit.DiTFamily, "written_for", {"GELU.forward": "00000000"})
    assert failing() == {"sources_are_noted"}
    with pytest.raises(
        ValueError,
        match="There is no family for 'DiTTransformer2D'; did you mean 'DiTTransformer2DModel'",
    ):
        contract.examine("DiTTransformer2D")
    with pytest.raises(AssertionError, match="sources_are_noted: written_for should hold"):
        contract.check_family("DiTTransformer2DModel")


ORIGINAL = BasicTransformerBlock.forward


def reworded(self, *args, **kwargs):
    return ORIGINAL(self, *args, **kwargs)


def recomputed(self, *args, **kwargs):
    return ORIGINAL(self, *args, **kwargs) * 1.01


def test_a_newer_diffusers_is_noticed_by_what_it_computes(monkeypatch):
    """A method that reads otherwise is tried out: it is refused if it computes something else, and
    only then.
    """
    dit = make_dit()
    monkeypatch.setattr(BasicTransformerBlock, "forward", reworded)
    assert digest(reworded) != digest(ORIGINAL)
    dit_lens.HookedDiT(dit).remove()
    monkeypatch.setattr(BasicTransformerBlock, "forward", recomputed)
    with pytest.raises(
        RuntimeError,
        match=r"BasicTransformerBlock.forward of diffusers .* is not what dit_lens repeats for "
        r"DiTTransformer2DModel: on its small model 0 .* another. Install",
    ):
        dit_lens.HookedDiT(dit)
    assert [n for n, m in dit.named_modules() if "forward" in m.__dict__] == []
    monkeypatch.setattr(BasicTransformerBlock, "forward", ORIGINAL)
    assert dit_lens.HookedDiT(dit).names


@pytest.mark.slow
def test_comments_and_blank_lines_do_not_count(tmp_path):
    (tmp_path / "one.py").write_text("def f(x):\n    return x + 1\n")
    (tmp_path / "two.py").write_text("def f(x):\n    # a comment\n\n      \n    return x + 1\n")
    (tmp_path / "three.py").write_text("def f(x):\n    if x:\n        x = 2\n    return x + 1\n")
    (tmp_path / "four.py").write_text("def f(x):\n    if x:\n        x = 2\n        return x + 1\n")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import one, two, three, four; from "
        "dit_lens.families.upstream import digest as d;"
        "print(d(one.f) == d(two.f), d(one.f) == d(three.f), d(three.f) == d(four.f))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["True", "False", "False"]


# What is declared.


class NewDiT(DiTTransformer2DModel):
    """A DiT of a later diffusers, with an option that nobody here knows."""

    @register_to_config
    def __init__(self, window=None, sides=(2, 2), **kwargs):
        super().__init__(**kwargs)


def test_a_new_option_is_refused_unless_it_is_at_its_default():
    config = {k: v for k, v in make_dit().config.items() if not k.startswith("_")}
    plain = NewDiT(**config).eval()
    assert plain.config.window is None and plain.config.num_layers == config["num_layers"]
    plain.register_to_config(sides=[2, 2])  # as it comes back from JSON
    dit_lens.HookedDiT(plain).remove()
    with pytest.raises(
        ValueError,
        match=r"^The model has window=8, an option of NewDiT that dit_lens does not know; expected "
        r"window=None, its default, or a newer dit_lens\.$",
    ):
        dit_lens.HookedDiT(NewDiT(window=8, **config))
    plain.register_to_config(sides=[2, 3])
    with pytest.raises(ValueError, match=r"has sides=\[2, 3\].*expected sides=\(2, 2\)"):
        dit_lens.HookedDiT(plain)


NOT_HONOURED = {
    "DiTTransformer2DModel": {"norm_type"},
    "PixArtTransformer2DModel": {"norm_type", "attention_type"},
    "HunyuanDiT2DModel": {"norm_type"},
    "QwenImageTransformer2DModel": {"zero_cond_t", "use_layer3d_rope", "use_additional_t_cond"},
    "WanTransformer3DModel": {"qk_norm", "pos_embed_seq_len"},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_todays_diffusers_is_known_or_refused(name):
    options = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    assert options - family_named(name).known_options == NOT_HONOURED.get(name, set())
    assert family_named(name).known_options <= options


@pytest.mark.parametrize("variant", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_axes_are_as_long_as_the_config_says(name, variant):
    """Every axis of every hook point, as seen in a run."""
    case = contract.Case(family_named(name), variant)
    seen, cfg = case.seen(), case.cfg
    lengths = {
        n.shape[case.model.sites[k].index("text_token")]
        for k, n in seen.items()
        if "text_token" in case.model.sites[k]
    }
    assert len(lengths) <= 1
    sizes = cfg.axis_sizes(batch=2, text=next(iter(lengths), None))
    for site, value in seen.items():
        axes = case.model.sites[site]
        assert list(value.shape) == [sizes[axis] for axis in axes], (site, axes)
    # without a text what depends on it is left out, and the rest stays
    rest = cfg.axis_sizes(batch=2)
    assert rest == {k: v for k, v in sizes.items() if k in rest}
    for axis in sizes.keys() - rest.keys():
        assert axis.startswith("text_") or (axis == "key" and cfg.joint)
    # and a file of a trace brings it back
    again = json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert type(cfg)(**{k: tuple(v) if isinstance(v, list) else v for k, v in again.items()}) == cfg


def test_the_docs_have_the_printed_table_of_differences():
    run = subprocess.run(
        [sys.executable, "-m", "dit_lens.families"], capture_output=True, text=True, check=True
    )
    page = (Path(dit_lens.__file__).parent.parent / "docs" / "families.md").read_text()
    assert run.stdout.count("\n") == len(OURS) + 2 and run.stdout in page


def test_an_author_needs_nothing_but_the_door():
    page = (Path(dit_lens.__file__).parent.parent / "examples" / "new_family.py").read_text()
    imported = set(re.findall(r"^(?:from|import) (dit_lens\S*)", page, re.M))
    assert imported == {"dit_lens", "dit_lens.families", "dit_lens.testing"}
    for name in families.__all__:
        assert hasattr(families, name)


# Joint sequences.


class FakePass:
    """A pass in which the transformer was given nothing."""

    transformer, couplings, listening, watchers = None, {}, 1, ()

    def __init__(self):
        self.now = {}


def scattered(inputs, length, transformer):
    """In the first item [text image image text], in the second [image image text text]."""
    assert (inputs, length, transformer) == ({}, 4, None)
    return Joint(torch.tensor([[1, 2], [0, 1]]), torch.tensor([[0, 3], [2, 3]]))


@pytest.mark.parametrize("dim", [1, 2])
def test_a_joint_point_takes_streams_apart_and_puts_them_back(dim):
    image, text = HookPoint("hook_z"), HookPoint("text.hook_z")
    current_pass = FakePass()
    point = JointPoint(image, text, current_pass, scattered, dim)
    x = torch.arange(8.0).view(2, 4, 1) if dim == 1 else torch.arange(8.0).view(2, 1, 4)
    assert point(x) is x and not point.listeners and not point.edited

    # observers are given their own stream's tokens, and the joint tensor itself goes on
    seen = {}
    image.add(Observer(lambda value, hook: seen.update({hook.name: value.flatten(1)})))
    text.add(Observer(lambda value, hook: seen.update({hook.name: value.flatten(1)})))
    assert point(x) is x and point.listeners and not point.changed and not point.edited
    assert seen["hook_z"].tolist() == [[1, 2], [4, 5]]
    assert seen["text.hook_z"].tolist() == [[0, 3], [6, 7]]

    # what an editor returns goes back to where it was taken from; x stays as it was
    text.add(Editor(lambda value, hook: value + 100))
    assert point(x).flatten(1).tolist() == [[100, 1, 2, 103], [4, 5, 106, 107]]
    assert x.flatten().tolist() == list(range(8)) and point.changed and point.edited

    # without a call under way there is nothing to go by, and nobody is shown anything
    current_pass.now = None
    assert point(x) is x


def test_a_joint_point_of_the_image_alone_leaves_the_rest():
    image = HookPoint("hook_z")
    point = JointPoint(image, None, FakePass(), lambda *_: Joint(slice(2), slice(2, None)))
    x = torch.arange(4.0).view(1, 4, 1)
    image.add(Editor(lambda value, hook: value * 0 - 1))
    assert point(x).flatten().tolist() == [-1, -1, 2, 3]
    image.drop(*image.attached)
    assert point(x) is x and not point.changed


def test_gradients_pass_through_a_joint_point():
    image, grads = HookPoint("hook_z"), []
    point = JointPoint(image, None, FakePass(), lambda *_: Joint(slice(2), slice(2, None)))
    image.add(BackwardEditor(lambda grad, hook: grads.append(grad.flatten().tolist())))
    x = torch.ones(1, 4, 1, requires_grad=True)
    out = point(x)
    assert point.edited and not point.changed and torch.equal(out, x)
    (out * torch.arange(4.0).view(1, 4, 1)).sum().backward()
    assert grads == [[0, 1]] and x.grad.flatten().tolist() == [0, 1, 2, 3]


# From outside.

STRANGER = """
    from diffusers import DiTTransformer2DModel
    from dit_lens.families import register
    from dit_lens.families.dit import DiTFamily

    class MyTransformer2DModel(DiTTransformer2DModel):
        pass

    class MyFamily(DiTFamily):
        model_class = "MyTransformer2DModel"

        def small(self, variant):
            model, condition = super().small(variant)
            mine = MyTransformer2DModel.from_config(model.config).eval()
            mine.load_state_dict(model.state_dict())
            return mine, condition

        def small_pipeline(self):
            return None

    register(MyFamily())
"""


def strangers(folder, name, module="stranger"):
    """A package on a path of its own that registers a family."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(textwrap.dedent(STRANGER))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dit_lens.families]\n{name} = {module}\n")
    return {"PYTHONPATH": str(folder)}


def command(*args, env=None):
    import os

    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from dit_lens.commands.main import main; import sys; sys.exit(main(sys.argv[1:]))",
            *args,
        ],
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        check=False,
    )


@pytest.mark.slow
def test_a_family_comes_from_another_package(tmp_path):
    env = strangers(tmp_path / "a", "MyTransformer2DModel")
    run = command("check-family", "MyTransformer2DModel", env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MyTransformer2DModel: 51 checks, 0 failed" in run.stdout
    script = (
        "import dit_lens, stranger, torch; m = stranger.MyFamily().small(0)[0];"
        "print(type(dit_lens.HookedDiT(m).family).__name__, len(dit_lens.HookedDiT(m).names))"
    )
    import os

    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | env,
        check=True,
    )
    assert ran.stdout.split() == ["MyFamily", "88"]


@pytest.mark.slow
def test_two_families_for_one_class_are_refused(tmp_path):
    run = command("check-family", env=strangers(tmp_path / "b", "DiTTransformer2DModel"))
    assert (
        run.returncode == 2
        and "There is a family for 'DiTTransformer2DModel' already, 'dit_lens.families.dit'"
        in run.stderr
    )
    assert "registers 'stranger' for it must be removed" in run.stderr


# What is not opened.


def test_what_is_refused(tmp_path):
    dit = make_dit()
    with pytest.raises(
        TypeError,
        match="UNet2DModel is not a Diffusion Transformer that dit_lens can open by itself; it",
    ):
        dit_lens.HookedDiT(
            UNet2DModel(
                sample_size=8,
                block_out_channels=(8,),
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
                norm_num_groups=4,
            )
        )
    with torch.device("meta"):
        empty = DiTTransformer2DModel.from_config(dit.config).eval()
    with pytest.raises(
        ValueError,
        match=r"DiTTransformer2DModel has no weights: \S+ is on the meta device. Load them first",
    ):
        dit_lens.HookedDiT(empty)
    quantised = copy.deepcopy(dit)
    linear = quantised.transformer_blocks[0].attn1.to_q
    linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError,
        match=r"has quantised or sharded weights "
        r"\(transformer_blocks.0.attn1.to_q.weight is torch.int8\).*load it unquantised",
    ):
        dit_lens.HookedDiT(quantised)
    two = copy.deepcopy(dit)  # a tensor that is made of others, as torchao's, quanto's, DTensor
    linear = two.transformer_blocks[0].attn1.to_q
    linear.weight = torch.nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data))
    with pytest.raises(
        ValueError, match=r"\(transformer_blocks.0.attn1.to_q.weight is a TwoTensor"
    ):
        dit_lens.HookedDiT(two)
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(dit), {torch.nn.Linear})
    with pytest.raises(ValueError, match=r"is a torch\.ao\.nn\.quantized\.dynamic\..*Linear\)"):
        dit_lens.HookedDiT(dynamic)

    class NoTransformer:
        components = {"transformer": None, "scheduler": None}
        transformer = None

    with pytest.raises(
        TypeError,
        match="NoTransformer is neither a transformer nor a pipeline with one; expected e.g. a "
        "DiTPipeline",
    ):
        dit_lens.HookedDiT(NoTransformer())
    for model in (empty, quantised, two, dynamic):
        assert [n for n, m in model.named_modules() if "forward" in m.__dict__] == []


@pytest.mark.parametrize(
    "name, value",
    [
        ("residual_connection", True),
        ("rescale_output_factor", 2.0),
        ("group_norm", torch.nn.Identity()),
        ("norm_q", torch.nn.Identity()),
    ],
)
@pytest.mark.parametrize("family", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_settings_of_attention_that_are_not_computed_with_are_refused(family, name, value):
    family = family_named(family)
    plain, condition = family.small(1)
    model = dit_lens.HookedDiT(plain)
    x, t = torch.zeros(2, *model.cfg.latent_shape), torch.tensor([500, 20])
    model(x, t, dict(condition))
    setattr(plain.transformer_blocks[1].attn1, name, value)
    with pytest.raises(RuntimeError, match=f"The attention was given {name}=.*default back"):
        model(x, t, dict(condition))
    model.remove()
    with pytest.raises(ValueError, match=f"Block 1 has {name}=.* in attn1, which dit_lens does no"):
        dit_lens.HookedDiT(plain)
