"""A transformer of the user's own, opened by the paths of its blocks.

    HookedDiT(module, blocks="blocks", adapter=Adapter(latents=(4, 32, 32), labels=10))

Nothing is known here of how a block computes. Its own forward runs, and the hook points lie where
torch's module hooks do: what a block, and a part of it that is named, is given and what it returns.
What a hook returns goes on in its place, exactly as from a module hook. With an `Adapter` the model
is run once as it is opened, which gives its sizes and holds the adapter against the model: how the
blocks run, where the image's tokens lie, whether the last layer can be read alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidState, InvalidValue
from ..hooks.names import layer_of
from ..hooks.passes import Pass
from .adapter import Adapter, Spoken, arguments_of, tensor_of
from .base import Skipped
from .boundaries import argument_of, given, parts
from .config import Config, Size
from .forwards import Forward, Points, TransformerForward
from .own_forwards import OwnBlock, OwnPart, OwnTransformer, Progress
from .own_look import grid_of, look, skipping
from .parts.joint import Joint, JointPoint, Point
from .parts.sites import OUTPUT, RESID, SAMPLE, Axes, Sites

SEQUENCE: Axes = ("batch", "sequence", "d_model")
LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def blocks_at(transformer: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """The blocks that module paths stand for: of a list of modules its items.

    Args:
        transformer: the transformer.
        paths: such as ["blocks"], or ["in_blocks", "mid_block", "out_blocks"].

    Raises:
        InvalidValue: for a path that leads nowhere, or a block that stands there twice.
    """
    found: list[nn.Module] = []
    for path in paths:
        at = module_at(transformer, path, "blocks")
        found += list(at.children()) if isinstance(at, LISTS) else [at]
    if not found or len({id(block) for block in found}) < len(found):
        what = "no block" if not found else "a block more than once"
        raise InvalidValue(
            f"blocks={list(paths)} holds {what}; expected the paths of lists of different modules, "
            "in the order in which they run."
        )
    return found


def module_at(root: nn.Module, path: str, name: str) -> nn.Module:
    """The module at a path.

    Args:
        root: from where.
        path: such as "model.blocks".
        name: of the argument that says it.

    Raises:
        InvalidValue: if there is none, with the nearest.
    """
    try:
        if path:
            return root.get_submodule(path)
    except AttributeError:
        pass
    known = [n for n, m in root.named_modules() if n and (name != "blocks" or isinstance(m, LISTS))]
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.3) or known[:1]
    raise InvalidValue(
        f"{type(root).__name__} has no module at {name}={path!r}"
        + (f" (nearest: {near[0]!r})." if near else "; expected the path of one.")
    )


class OwnFamily(Spoken):
    """How dit_lens opens one transformer by the paths of its blocks.

    Args:
        transformer: the transformer.
        blocks: paths of its blocks, or of lists of them, in the order in which they run.
        inside: paths within a block by the names that they get, such as {"attn": "attn"}; None is
            what the block's source shows to be its attention and MLP.
        adapter: how it is called; None where only a loop of the user's own calls it.

    Attributes:
        seen: what running it once showed; None without an adapter.
    """

    differs = "opened by the paths of its modules, with the names that lie on their boundaries"
    computes: dict[str, tuple[str, ...]] = {}

    def __init__(
        self,
        transformer: nn.Module,
        blocks: Sequence[str],
        inside: Mapping[str, str] | None,
        adapter: Adapter | None,
    ) -> None:
        self.model_class = type(transformer).__name__
        names = () if adapter is None else adapter.names
        if adapter is not None and not adapter.latents:
            raise arguments.refusal(
                "latents", adapter.latents, "the shape of one item's x_t, such as (4, 32, 32)"
            )
        super().__init__(*arguments_of(transformer, names), adapter)
        if not self.n_classes:
            self.labels_name = ""  # what the third argument is given is no class
        self.paths = list(blocks)
        found = blocks_at(transformer, self.paths)
        self.inside = None if inside is None else dict(inside)
        for name, path in (self.inside or {}).items():
            for block in found:
                module_at(block, path, f"parts[{name!r}]")
        self.streams = sorted({argument_of(block) for block in found})
        self.refuse_shared(found)
        self.progress = Progress()
        self.seen = None if adapter is None else look(self, transformer, adapter)

    @property
    def stream(self) -> Axes:
        """The axes of the stream: of tokens, if it is known which are the image's."""
        return SEQUENCE if self.seen is None else RESID

    @property
    def pads(self) -> bool:  # type: ignore[override]
        return self.seen is not None and self.seen.beside > 0

    @property
    def first_sites(self) -> Sites:  # type: ignore[override]
        return {"hook_embed": self.stream}

    @property
    def last_sites(self) -> Sites:  # type: ignore[override]
        of_image = self.adapter is not None and len(self.adapter.latents) == 3
        return {"hook_sample": SAMPLE if of_image else OUTPUT}

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return blocks_at(transformer, self.paths)

    def parts_of(self, block: nn.Module) -> dict[str, str]:
        """Paths within a block by the prefix of their names.

        Args:
            block: the block.
        """
        if self.inside is None:
            return dict(parts(block))
        return {f"{name}.": path for name, path in self.inside.items()}

    def refuse_shared(self, blocks: Sequence[nn.Module]) -> None:
        """Refuse a part that is the same module as another, or as a block.

        Args:
            blocks: the blocks.

        Raises:
            InvalidValue: with both.
        """
        known = {id(block): f"block {i}" for i, block in enumerate(blocks)}
        for i, block in enumerate(blocks):
            for prefix, path in self.parts_of(block).items():
                module, said = block.get_submodule(path), f"{prefix[:-1]!r} of block {i}"
                if id(module) in known:
                    raise InvalidValue(
                        f"{known[id(module)]} and {said} are one module, a "
                        f"{type(module).__name__}, whose hook points can't be told apart; expected "
                        "parts= without it, {} for none."
                    )
                known[id(module)] = said

    def certain_at(self, name: str) -> str:
        layer = layer_of(name)  # a part may run again until its block ends
        return name if layer is None else f"blocks.{layer}.hook_resid_post"

    def block_sites(self, block: Any) -> Sites:
        ends = [f"{prefix}hook_{end}" for prefix in self.parts_of(block) for end in ("in", "out")]
        return dict.fromkeys(("hook_resid_pre", *ends, "hook_resid_post"), self.stream)

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        hook: dict[str, Point] = dict(points)
        if self.pads:
            hook = {n: JointPoint(p, None, current_pass, self.layout) for n, p in points.items()}
        forwards: list[Forward] = [
            OwnBlock(block, hook, current_pass, layer, self.progress, self.x_name)
        ]
        for prefix, path in self.parts_of(block).items():
            before, after = hook[f"{prefix}hook_in"], hook[f"{prefix}hook_out"]
            part = block.get_submodule(path)
            forwards.append(OwnPart(part, before, after, current_pass, self.progress, self.x_name))
        return forwards

    def layout(self, inputs: dict[str, Any], length: int, transformer: Any) -> Joint:
        """Where the image's tokens lie in the stream, or in what a part is given of it.

        Args:
            inputs: the transformer's arguments.
            length: how many tokens that has.
            transformer: the transformer.

        Raises:
            InvalidState: for other tokens than all of the stream's, or all of the image's.
        """
        assert self.seen is not None
        image, others = self.seen.tokens, self.seen.beside
        if length == image + others:
            return Joint(self.image_tokens, slice(0, 0))
        if length != image or image == others:
            raise InvalidState(
                f"A part of a block is given {length} tokens, and which of them are the image's "
                f"can't be told; expected all {image + others} of the stream, or the image's "
                f"{image} where there are not as many others."
            )
        return Joint(slice(None), slice(0, 0))

    def whole_forward(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> TransformerForward:
        return OwnTransformer(transformer, points, current_pass, self.x_name, self.turned)

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        return []

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        n, adapter, seen = len(self.blocks(transformer)), self.adapter, self.seen
        if adapter is None or seen is None:
            return Config(n, 0, 0, 0, 0, 0, 0, 0, latent_shape=(), grid=(), restartable=False)
        if size is not None and tuple(size) != adapter.latents[-len(size) :]:
            raise arguments.refusal(
                "size", size, f"{adapter.latents[1:]}, the adapter's latents, or another adapter"
            )
        grid = grid_of(adapter, seen.tokens)
        return Config(
            n_layers=n,
            d_model=seen.d_model,
            n_heads=0,
            d_head=0,
            d_mlp=0,
            patch_size=adapter.latents[-1] // grid[-1],
            in_channels=adapter.latents[0],
            out_channels=seen.channels,
            latent_shape=adapter.latents,
            grid=grid,
            n_classes=self.n_classes,
            has_null=seen.null,
            restartable=False,
        )

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        if self.adapter is None or self.seen is None:
            return ()
        return grid_of(self.adapter, self.seen.tokens)

    def final(
        self, transformer: Any, stream: Tensor, inputs: dict[str, Any], memo: dict[str, Any]
    ) -> Tensor | None:
        if self.seen is None or not self.seen.lens:
            why = (
                "how it is called is not known; expected an adapter"
                if self.seen is None
                else "the output depends on more than that stream; expected a family of its own"
            )
            raise InvalidState(
                f"{self.model_class}'s streams can't be read by its last layer: {why} "
                "(docs: Your own model)."
            )
        return None

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        own = next((each for each in self.streams if each[0] in kwargs), self.streams[0])
        return skipping(given(own, args, kwargs), self.image_tokens)

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        return tensor_of(returned, type(block).__name__)[:, self.image_tokens]

    @property
    def image_tokens(self) -> slice:
        """Where the image's tokens lie in the stream."""
        return slice(None) if self.adapter is None else self.adapter.tokens
