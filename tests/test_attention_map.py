"""Attention of words: planted in every family through its own tokenizer, text encoder and
attention, and read back by the word.
"""

import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

import dit_lens
from dit_lens.errors import InvalidState, InvalidValue
from dit_lens.families import family_named
from dit_lens.families.parts.words import Text, places_of, tokens_of, words_of
from dit_lens.families.registry import OURS

NAMES = [name for name in OURS if name != "DiTTransformer2DModel"]
FAST = "PixArtTransformer2DModel"
FOX = set("fox")


class Marking:
    """Text encoders whose output is moved where they are given a letter of "fox"; nothing of
    dit_lens is asked where that is.
    """

    def __init__(self, pipe):
        self.on = False
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(pipe, name, None)
            encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
            if tokenizer is not None and encoder is not None:
                encoder.register_forward_hook(self.of(tokenizer), with_kwargs=True)

    def of(self, tokenizer):
        def hook(_, args, kwargs, out):
            ids = args[0] if args else kwargs["input_ids"]
            start = self.start(tokenizer, ids)
            said = [
                [tokenizer.decode([i]).strip().removeprefix("##") for i in r] for r in ids.tolist()
            ]
            marked = torch.tensor([[s in FOX for s in row] for row in said])
            marked[:, :start] = False
            hidden = [h for h in (out[0], *(out.hidden_states or ())) if h.ndim == 3]
            for value in {id(h): h for h in hidden}.values() if self.on else ():
                value[marked] += 9 * torch.randn(value.shape[-1])
            return out

        return hook

    @staticmethod
    def start(tokenizer, ids):
        """Where the prompt starts: templates have letters of their own."""
        said = "".join(tokenizer.decode([i]) or " " for i in ids[0].tolist())
        where = said.replace(" ", "").rfind("aredfox")
        length, n = 0, 0
        while length < where and n < ids.shape[1]:
            length += len(tokenizer.decode([ids[0, n].item()]).replace(" ", ""))
            n += 1
        return n - 1 if where > 0 else 0


@pytest.mark.parametrize(
    "name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_word_that_attends_to_a_corner_is_found_there(name):
    family = family_named(name)
    pipe = family.small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    marking, call = Marking(pipe), family.small_call(False)
    call = {**call, "prompt": ["a red fox", "a boat"], "output_type": "latent"}
    model = dit_lens.HookedDiT(pipe)

    def run(names, edits=()):
        with warnings.catch_warnings(), dit_lens.trace(model, names=names) as t:
            warnings.simplefilter("ignore")
            for at, fn in edits:
                t.edit(at, fn)
            # one of the pipelines writes into the list of prompts
            own = {**call, "prompt": list(call["prompt"])}
            pipe(**own, generator=torch.Generator().manual_seed(0))
        return t

    # which of the text's keys are the word's, by what the encoders' answer moves
    cross = "blocks.0.cross_attn.hook_k" in model.names
    prefix = "cross_attn." if cross else "attn."
    key = f"blocks.0.{'' if cross else 'text.'}{prefix}hook_k"
    before = run([key])[key][0]
    marking.on = True
    torch.manual_seed(0)
    moved = (run([key])[key][0] - before).flatten(2).norm(dim=2)[0]
    marking.on = False
    n = 6 if name[:3] in ("SD3", "Hun") else 3
    marked = moved.topk(n).indices
    assert moved[marked].min() > 1.2 * moved.sort().values[-n - 1], moved.sort().values[-9:]

    # weights of attention as they are once queries and keys are what is planted
    def planted(where):
        def edit(a, hook):
            a = torch.zeros_like(a)
            a[0, where, :, 0] = 40.0
            return a

        return edit

    grid = model.cfg.grid
    corner = int(np.ravel_multi_index((*[0] * (len(grid) - 1), grid[-1] - 1), grid))
    rot = "rot_" if f"blocks.0.{prefix}hook_rot_q" in model.names else ""
    edits = [(f"{prefix}hook_{rot}q", planted([corner]))]
    if cross:
        edits.append((f"{prefix}hook_{rot}k", planted(marked)))
    else:
        edits += [(f"attn.hook_{rot}k", planted([])), (f"text.attn.hook_{rot}k", planted(marked))]
    t = run(None, edits)

    found = t.attention_map("fox", over=())
    heads = model.cfg.own_axes.get("cross_head", model.cfg.n_heads)  # Sana's
    assert found["batch"].values.tolist() == [0] and found.sizes["head"] == heads
    flat = found.values.reshape(*found.shape[: -len(grid)], -1)  # layer, step, head, item, query
    assert (flat[..., corner] > 0.99).all()
    assert (np.delete(flat, corner, axis=-1) < 0.6).all()
    both = t.attention_map(["red", "fox"]).values.reshape(2, -1)
    assert both[0, corner] < 0.01 < 0.99 < both[1, corner]
    assert np.isclose(found.mean(("layer", "step", "head")), t.attention_map("fox")).all()
    with pytest.raises(
        InvalidValue, match="'foxe' is no word of any of 2 prompts; did you mean 'fox'"
    ):
        t.attention_map("foxe")


@pytest.fixture(scope="module")
def traced():
    pipe = family_named(FAST).small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    model = dit_lens.HookedDiT(pipe)
    with dit_lens.trace(model) as t:
        dit_lens.sample(model, ["a red fox, a red barn"] * 2, steps=2, guidance=3.0)
    return t


def test_words_are_labelled_and_sub_tokens_merged(traced):
    every = traced.attention_map()
    assert every.word.values.tolist() == ["a", "red", "fox", "a", "red", "barn"]
    assert every.dims == ("word", "batch", "row", "column") and every.sizes["batch"] == 2
    # all places of a word are summed; words in a row are one
    red = every.isel(word=1) + every.isel(word=4)
    assert np.allclose(traced.attention_map("RED"), red, atol=1e-6)
    assert np.allclose(
        traced.attention_map("red fox"), every.isel(word=1) + every.isel(word=2), atol=1e-6
    )
    pattern = traced.get("cross_attn.pattern", branch="cond")
    whole = next(iter(pattern.values()))
    assert np.allclose(whole.sum(-1), 1) and float(every.sum("word").max()) < 1


def test_recorded_patterns_are_read_as_recomputed_ones(traced):
    model = traced.model
    with dit_lens.trace(model, names="cross_attn.pattern") as t:
        dit_lens.sample(model, ["a red fox, a red barn"] * 2, steps=2, guidance=3.0)
    assert np.array_equal(t.attention_map("fox"), traced.attention_map("fox"))
    one = traced.attention_map("fox", layers=[-1], steps=[1], heads=[0], over=["step", "layer"])
    assert one["head"].values.tolist() == [0] and one.dims == ("head", "batch", "row", "column")


def test_it_is_stored_and_drawn(traced, tmp_path):
    found = traced.attention_map(["red", "fox"])
    found.to_netcdf(tmp_path / "map.nc")
    with xr.open_dataarray(tmp_path / "map.nc") as read:
        assert read.identical(found.astype(read.dtype))
    images = np.random.default_rng(0).random((2, 3, 16, 16))
    ax = found.plot.words(torch.from_numpy(images).requires_grad_())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["", "red", "fox"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1"]
    drawn = ax.images[0].get_array()
    assert np.allclose(drawn[:16, :16], images[0].transpose(1, 2, 0))
    # a token is a block of pixels, coloured by its share of the largest
    scale = matplotlib.colormaps["viridis"](found / found.max())[..., :3]
    assert np.allclose(drawn[::4, 18:34:4][:4], scale[0, 0], atol=0.01)
    each = traced.attention_map("fox", over=["step", "head"]).isel(batch=0)
    assert each.plot.words().get_ylabel() == "layer" and found.isel(word=0, batch=1).plot.words()
    with pytest.raises(InvalidValue, match="expected None beside maps along layer"):
        each.plot.words(images)
    with pytest.raises(InvalidValue, match=r"images=\[1, 3, 16, 16\] .* 2 or more of them"):
        found.plot.words(images[:1])
    with pytest.raises(InvalidValue, match=r"Maps along word, step, head, .* \.isel\(\)"):
        traced.attention_map(["red", "fox"], over=["layer"]).plot.words()
    assert found.isel(word=0, batch=0).plot() is not None  # xarray's own
    plt.close("all")


def test_refusals(traced, tmp_path):
    with pytest.raises(
        InvalidValue, match="'cat' is no word of 'a red fox, a red barn'; expected o"
    ):
        traced.attention_map("cat")
    with pytest.raises(InvalidValue, match=r"over\[0\]='layers' can't be used; .*'layer'"):
        traced.attention_map("fox", over=["layers"])
    with pytest.raises(InvalidValue, match="layers"):
        traced.attention_map("fox", layers=[9])
    with pytest.raises(InvalidValue, match="prompt='a new boat' is not what this run was asked fo"):
        traced.attention_map("boat", prompt="a new boat")
    loaded = dit_lens.load_trace(traced.save(tmp_path / "t"))
    with pytest.raises(InvalidState, match="was loaded without its model, whose tokenizers are ne"):
        loaded.attention_map("fox")
    with dit_lens.trace(dit_lens.load("digits")) as t:
        pass
    with pytest.raises(InvalidState, match="open the pipeline"):
        t.attention_map("fox")


def test_a_run_whose_prompt_is_not_known(traced):
    """A loop of one's own, by arguments; the prompt is then said, and its length held against."""
    model = traced.model
    condition = model.family.encode(model.conditions.pipe, "a fox")
    with dit_lens.trace(model) as t, torch.no_grad():
        model(torch.randn(1, *model.cfg.latent_shape), torch.tensor([500]), dict(condition))
    with pytest.raises(InvalidValue, match="The prompt of this run is not known; say what the tex"):
        t.attention_map("fox")
    assert t.attention_map("fox", prompt="a fox").sizes["batch"] == 1
    with pytest.raises(InvalidState, match="makes 12 tokens, and the text encoder was given"):
        t.attention_map("boat", prompt="a new boat")


def test_the_prompt_that_was_asked_for_may_be_said_too(traced, tmp_path):
    """In our own loop the null halves have another one; a file does not hold the words."""
    model, words = traced.model, "a red fox, a red barn"
    with dit_lens.trace(model) as t:
        dit_lens.sample(model, [words], steps=1, guidance=3.0)
    own = t.attention_map("fox")
    assert own.equals(t.attention_map("fox", prompt=words))
    loaded = dit_lens.load_trace(t.save(tmp_path / "t"), model)
    with pytest.raises(InvalidValue, match="The prompt of this run is not known"):
        loaded.attention_map("fox")
    assert own.equals(loaded.attention_map("fox", prompt=words))


def test_words_are_looked_for_in_the_prompts_of_each_run(traced):
    model = traced.model

    def sampled(*prompts):
        with dit_lens.trace(model) as t:
            for each in prompts:
                dit_lens.sample(model, each, steps=2, guidance=3.0)
        return t

    first, second = ["a red fox", "a fox on a boat"], ["a barn, a fox", "the fox is asleep"]
    both, alone = sampled(first, second), sampled(second)
    found = both.attention_map("fox", over=["layer", "head"])
    assert np.array_equal(
        found.sel(step=[2, 3]), alone.attention_map("fox", over=["layer", "head"])
    )
    assert found.attrs["prompts"].split("\n") == first + second
    one = np.mean([sampled(p).attention_map("fox") for p in (first, second)], axis=0)
    assert np.allclose(both.attention_map("fox"), one, atol=1e-6)
    with pytest.raises(InvalidValue, match="No prompt has .*'red'.* at step 2, .*steps=.0, 1"):
        both.attention_map("red")
    assert both.attention_map("red", steps=[0, 1]).batch.values.tolist() == [0]
    with pytest.raises(
        InvalidValue, match="'boat'.* items .1. at step 0 and of items .0. at step 2"
    ):
        sampled(first, ["a boat", "a barn"]).attention_map("boat")
    with pytest.raises(
        InvalidValue, match="There are 2 different prompts, .* steps= of a run with"
    ):
        sampled(["a red fox"], ["a barn"]).attention_map()
    with pytest.raises(InvalidValue, match="'cat' is no word of any of 4 prompts"):
        both.attention_map("cat")


def test_the_prompts_of_a_file_are_not_those_that_another_model_was_asked(traced, tmp_path):
    """Whose numbers are the same."""
    loaded = dit_lens.load_trace(traced.save(tmp_path / "t"), traced.model)
    with pytest.raises(InvalidValue, match="The prompt of this run is not known; say what the tex"):
        loaded.attention_map("fox")
    said = loaded.attention_map("fox", prompt="a red fox, a red barn")
    assert np.allclose(said, traced.attention_map("fox"), atol=1e-6)


class Whole:
    """A tokenizer of whole words and marks, that decodes each with a space before it."""

    def __call__(self, text, truncation):
        return {"input_ids": ["<s>", *text.lower().replace(",", " ,").split(), "</s>"]}

    def decode(self, ids, skip_special_tokens=True):
        kept = [i for i in ids if not (skip_special_tokens and i.startswith(("<", "</")))]
        return " ".join(kept)


def test_templates_crops_and_cuts():
    prompt = "A small Fox, asleep"
    text = Text(Whole(), f"draw this : {prompt} now", dropped=3)
    found = tokens_of([text], prompt, 20)
    assert [t.key for t in found] == [1, 2, 3, 4, 5]
    assert [t.text for t in found] == ["a", "small", "fox", ",", "asleep"]
    # two encoders, the first with four keys, of which the last is its mark of the end
    both = tokens_of([Text(Whole(), prompt, 4), Text(Whole(), prompt)], prompt, 12)
    assert [t.key for t in both if t.text == "fox"] == [7]
    assert [t.text for t in both][:2] == ["a", "small"]
    assert words_of("the dog's café")[1][0] == "dog's" and places_of("cat", "concatenate") == []
    assert places_of("猫", "黒い猫が寝る") == [(2, 3)]


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "ZImageTransformer2DModel"])
def test_a_prompt_is_not_found_in_the_template_behind_it(name):
    """Which says "assistant"."""
    family = family_named(name)
    pipe = family.small_pipeline()
    found, as_long = (
        [t.key for t in tokens_of(family.texts(pipe, prompt), prompt, 400)]
        for prompt in ("ant", "fox")
    )
    assert len(found) == 3 and found == as_long


def test_prompts_of_several_encoders():
    """Flux's keys are those of prompt_2; SD3's are of all three, which have to be one."""
    flux, sd3 = (family_named(f"{n}Transformer2DModel").small_pipeline() for n in ("Flux", "SD3"))
    size = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}

    def traced(pipe, **asked):
        with dit_lens.trace(pipe) as t:
            pipe(**size, **asked, generator=torch.Generator().manual_seed(0))
        return t

    t = traced(flux, prompt="a fox", prompt_2=["a house, a fox"], max_sequence_length=32)
    assert t.attention_map("fox").attrs["prompts"] == "a house, a fox"
    t = traced(sd3, prompt="a fox", prompt_2=["a fox"], negative_prompt_3="a dog")
    assert t.attention_map("fox").attrs["prompts"] == "a fox"
    for given in ({}, {"prompt": "a dog"}):
        with pytest.raises(InvalidValue, match="different prompts .prompt and prompt_2 and promp"):
            t.attention_map("dog", branch="uncond", **given)
    t = traced(sd3, prompt="a fox", prompt_3="a house, a fox")
    with pytest.raises(InvalidValue, match="encoders were given different prompts"):
        t.attention_map("fox")


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "PixArtTransformer2DModel"])
def test_the_negative_prompt_s_words_are_those_of_its_branch(name):
    """In one batch and in two calls; by hand from the patterns of that branch."""
    family = family_named(name)
    pipe = family.small_pipeline()
    asked = family.small_call(True) | {"prompt": ["a red fox"], "output_type": "latent"}
    with dit_lens.trace(pipe) as t:
        pipe(**asked | {"negative_prompt": "fox a red"})
    found = t.attention_map("fox", branch="uncond")
    assert found.attrs["prompts"] == "fox a red"
    said = t.attention_map("fox", branch="uncond", prompt="fox a red")
    assert found.identical(said) and not found.equals(t.attention_map("fox", branch="cond"))
    with pytest.raises(ValueError, match="'cat' is no word of 'fox a red'"):
        t.attention_map("cat", branch="uncond")
    with dit_lens.trace(pipe) as t:
        pipe(**asked)
    with pytest.raises(ValueError, match="'fox' is no word of ''"):
        t.attention_map("fox", branch="uncond")
