"""The layouts of the original DiT, SiT and U-ViT, on small models of our own."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from small_layouts import MODELS, AdaBlock, DiT, Times, family_of_kind, small_of
from torch import nn

import dit_lens
from dit_lens.errors import InvalidState, InvalidType, InvalidValue
from dit_lens.families import dit_from_original, family_of, small_inputs
from dit_lens.testing import family_contract as contract

KINDS = sorted(MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind):
    rows = contract.examine(family_of_kind(kind))
    failed = [f"{row.where}: {row.check}: {row.message}" for row in rows if not row.ok]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_bit_for_bit(kind, dtype):
    for variant in range(3):
        plain, condition = small_of(kind, variant)
        plain = plain.to(dtype)
        inputs = small_inputs(family_of(plain), plain, condition)
        opened = copy.deepcopy(plain)
        model = dit_lens.HookedDiT(opened)
        with torch.no_grad(), model.hooks([(None, lambda a, hook: None)]):
            assert torch.equal(opened(**inputs), plain(**inputs))


def test_each_is_known_by_its_names():
    """And is spoken to as it was published: SiT's time runs the other way, as does its velocity."""
    found = {kind: family_of(small_of(kind, 0)[0]) for kind in KINDS}
    assert [found[kind].model_class for kind in KINDS] == ["DiT", "SiT", "DiT", "UViT"]
    sit, _ = small_of("sit", 0)
    model = dit_lens.HookedDiT(sit)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1000.0, 250.0]), torch.tensor([3, 10])
    with torch.no_grad():
        assert torch.equal(model(x, t, y), -sit(x, torch.tensor([0.0, 0.75]), y))
    assert model.cfg.null_class == 10 and model.cfg.latent_shape == (4, 8, 8)


def test_no_lens_where_the_output_depends_on_x_besides():
    class AddingDiT(DiT):
        def forward(self, x, t, y):
            return torch.cat([0.5 * x, 0 * x], dim=1) + super().forward(x, t, y)

    plain, _ = small_of("dit", 0)
    t, y, stream = torch.tensor([500, 500]), torch.tensor([3, 10]), torch.randn(2, 16, 16)
    assert dit_lens.HookedDiT(plain).unembed(stream, t, y).shape == (2, 8, 8, 8)
    plain.__class__ = AddingDiT
    with pytest.raises(InvalidState, match="the output depends on more than that stream; expected"):
        dit_lens.HookedDiT(plain).unembed(stream, t, y)


def test_guidance_in_the_models_own_method_is_traced():
    model = dit_lens.HookedDiT(small_of("dit", 0)[0])
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.tensor([3, 10])
    with dit_lens.trace(model) as seen, torch.no_grad():
        model.transformer.forward_with_cfg(x, t, y, 4.0)
    assert seen["resid_post", 1].shape == (1, 2, 16, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_and_measured(kind):
    scheduler = DDIMScheduler(1000) if kind != "sit" else FlowMatchEulerDiscreteScheduler()
    model = dit_lens.HookedDiT(small_of(kind, 0)[0], scheduler)
    pair = dit_lens.twins(model, pairs=2, steps=4, release=2)
    assert pair.run.latents.isfinite().all()
    coupled = dit_lens.twins(model, pairs=2, steps=4, release=2, tie="attention", g=0.5)
    assert not torch.equal(coupled.run.latents[-1], pair.run.latents[-1])


def test_what_only_has_the_names_is_refused():
    """Blocks that compute something else under DiT's names, gates put otherwise."""

    class Ungated(AdaBlock):
        def forward(self, x, c, skip=None):
            return super().forward(x, c) + 1e-3 * x

    model = small_of("dit", 0)[0]
    model.blocks[1].__class__ = Ungated
    with pytest.raises(InvalidValue, match="its Ungated computes something else; expected it op"):
        dit_lens.HookedDiT(model)
    assert not any("forward" in vars(module) for module in model.modules())
    opened = dit_lens.HookedDiT(model, blocks="blocks")
    assert "blocks.0.attn.hook_out" in opened.names


def test_a_class_of_another_name_must_say_how_it_counts_time():
    class Painter(DiT):
        pass

    model = dit_lens.HookedDiT(Painter().eval(), DDIMScheduler(1000))
    with pytest.raises(InvalidState, match=r"has no 'DiT' in it; expected HookedDiT\(module, adap"):
        dit_lens.sample(model, [1], steps=2)
    model.remove()
    told = dit_lens.HookedDiT(
        model.transformer, DDIMScheduler(1000), adapter=dit_lens.Adapter(labels=10)
    )
    assert dit_lens.sample(told, [1], steps=2).latents.isfinite().all()


@pytest.mark.parametrize(
    ("where", "name", "said"),
    [
        ("blocks.1.mlp", "fc1", "SiT, but `mlp` has no `fc1`."),
        ("blocks.0.attn", "num_heads", "SiT, but `attn` has no `num_heads`."),
        ("x_embedder", "proj", "SiT, but `x_embedder` has no `proj`."),
        ("y_embedder", "embedding_table", "SiT, but `y_embedder` has no `embedding_table`."),
        ("", "pos_embed", "SiT, but it has no `pos_embed`."),
        ("blocks.1", "norm2", "SiT, but block 1 has no `norm2`."),
    ],
)
def test_a_near_layout_is_told_what_it_lacks(where, name, said):
    model = small_of("sit", 0)[0]
    delattr(model.get_submodule(where), name)
    with pytest.raises(InvalidType, match="It has the children of ") as error:
        dit_lens.HookedDiT(model)
    assert f"It has the children of {said} Three ways on" in str(error.value)


def test_a_model_in_pefts_wrapping_is_opened_inside():
    class PeftModel(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = torch.nn.Module()
            self.base_model.model = model

    with pytest.raises(InvalidType, match=r"This is a PeftModel, .*open its .base_model.model"):
        dit_lens.HookedDiT(PeftModel(small_of("dit", 0)[0]))


@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_a_model_without_a_label_for_no_class(kind):
    """DiT trained without label dropout, U-ViT's table of 11 labels."""
    model = small_of(kind, 0)[0]
    if kind == "dit":
        table = model.y_embedder.embedding_table
        table.weight, table.num_embeddings = nn.Parameter(table.weight[:-1].detach()), 10
    hooked = dit_lens.HookedDiT(model, DDIMScheduler(1000))
    n = hooked.cfg.n_classes
    assert dit_lens.sample(hooked, [n - 1], steps=2).latents.isfinite().all()
    with pytest.raises(InvalidValue, match=f"Label {n} is out of range; expected 0 to {n - 1}.$"):
        dit_lens.sample(hooked, [n], steps=2)
    with pytest.raises(InvalidValue, match=f"The model has {n} labels and none for no class, whi"):
        dit_lens.sample(hooked, [1], steps=2, guidance=2.0)
    hooked.remove()
    with pytest.raises(InvalidValue, match=f"labels={n + 1} can't be used; expected at most {n}"):
        dit_lens.HookedDiT(model, adapter=dit_lens.Adapter(labels=n + 1))
    said = dit_lens.HookedDiT(model, DDIMScheduler(1000), adapter=dit_lens.Adapter(labels=n - 1))
    assert dit_lens.sample(said, [1], steps=2, guidance=2.0).latents.isfinite().all()


def test_train_mode_is_refused():
    with pytest.raises(InvalidState, match="DiT is in train mode; call model.eval"):
        dit_lens.HookedDiT(DiT().train())


# Conversion.


def test_an_original_checkpoint_in_diffusers(monkeypatch):
    """Equal to rounding, but for diffusers' own spacing of the time's frequencies."""
    torch.manual_seed(0)
    plain = small_of("dit", 0)[0]
    plain.pos_embed.data.normal_()
    converted = dit_from_original(plain.state_dict(), heads=2)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([700.0, 31.0]), torch.tensor([3, 10])
    with torch.no_grad():
        theirs = converted(x, t, class_labels=y).sample
        assert 0 < (plain(x, t, y) - theirs).abs().max() < 1
        rates = 10000 ** -(torch.arange(128) / 127)
        waves = t[:, None] * rates
        waves = torch.cat([waves.cos(), waves.sin()], dim=1)
        monkeypatch.setattr(Times, "forward", lambda self, t: self.mlp(waves))
        assert torch.allclose(plain(x, t, y), theirs, atol=1e-4)


def test_what_is_no_original_checkpoint_is_refused():
    weights = small_of("dit", 0)[0].state_dict()
    with pytest.raises(InvalidValue, match="heads=None can't be used; expected a number, as a wid"):
        dit_from_original(weights)
    with pytest.raises(InvalidValue, match="'extra.weight' the shape .7.; expected None"):
        dit_from_original(weights | {"extra.weight": torch.zeros(7)}, heads=2)
    weights.pop("blocks.1.mlp.fc1.bias")
    with pytest.raises(InvalidValue, match="'transformer_blocks.1.ff.net.0.proj.bias' the shape N"):
        dit_from_original(weights, heads=2)
    with pytest.raises(InvalidValue, match="The weights have no 'x_embedder.proj.weight'"):
        dit_from_original({})
