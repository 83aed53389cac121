"""What the model would answer if it stopped at layer l: every layer's stream read through the final
layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dit_lens import Bands, HookedDiT, Probe, Run, Series, Site, sample, trace
from dit_lens.errors import InvalidState, InvalidValue

NOTHING = (
    "LayerLens has seen nothing: use its run(model, ...), or `with "
    "dit_lens.trace(model, probes=[...])`."
)


class LayerLens(Probe):
    """Each layer's predicted clean x0, and how well it agrees, band by band, with how the images
    end.

    The logit lens (nostalgebraist 2020) for DiTs: the stream after block l goes through the last
    layer, with the conditioning of that step, and the output is turned into x0. At the last layer
    this is the model's own prediction; layer -1 is the embedding. Kept are only these x0, one
    latent a layer, step and item, in a temporary file until they are compared.

    Args:
        bands: a `Bands` of the latents' pixel grid; by default six radial bands.

    Raises:
        ValueError: at the start if the model has no scheduler.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> LayerLens(Bands.radial((16, 16), cut=0.1)).run(model, [3, 3], steps=2).agreement.sizes
    Frozen({'layer': 29, 'step': 2, 'band': 2})
    """

    names = ("hook_embed", "resid_post")
    in_parts = True
    of_each_label = 2

    def __init__(self, bands: Bands | None = None) -> None:
        self.wanted_bands = bands
        self.seen = Series()

    def start(self, model: HookedDiT) -> None:
        """Forget earlier runs.

        Args:
            model: what is traced; it needs a scheduler.
        """
        if model.scheduler is None:
            raise InvalidValue(
                "LayerLens needs the model's scheduler to turn outputs into x0: "
                "HookedDiT(transformer, scheduler=...)."
            )
        self.model = model
        self.bands = self.wanted_bands or Bands.radial(model.cfg.pixels)
        self.seen = Series(on_disk=True)
        self.labels: dict[tuple[int, ...], Tensor | None] = {}
        self.timesteps: dict[int, Tensor] = {}  # where the model is
        self.schedulers: dict[int, Any] = {}  # of the run that a step is of
        self.known_times: dict[int, Tensor] = {}

    def observe(self, activation: Tensor, site: Site) -> None:
        """Keep the x0 that the stream stands for.

        Args:
            activation: the residual stream, [batch, token, d_model].
            site: where and when it was seen.
        """
        layer = -1 if site.layer is None else site.layer
        with torch.no_grad():
            output = self.model.unembed(activation, site.t, site.condition)
        self.seen.put(site, self.model.without_variance(output), layer)
        if layer == -1:
            self.seen.put(site, site.x, "x")
            self.timesteps.setdefault(site.step, site.t[0])
            self.schedulers[site.step] = site.scheduler
            self.known_times = {}
            self.labels.setdefault(site.rows, site.labels)

    @property
    def layers(self) -> list[int]:
        """The layers that were seen, rising; -1 is the embedding."""
        return sorted(key for key in self.seen.keys if key != "x")

    def x0(self, layer: int, step: int, device: torch.device | None = None) -> Tensor:
        """The clean latents that a layer's stream stands for, [batch, *latent_shape].

        Args:
            layer: -1 is the embedding.
            step: 0 is the noisiest.
            device: where they are wanted; None is the host.

        Raises:
            InvalidState: if nothing was seen.
            InvalidValue: for a layer or a step that was not seen.
        """
        if not (steps := self.seen.steps):
            raise InvalidState(NOTHING)
        last = self.model.cfg.n_layers - 1
        if layer not in range(-1, last + 1):
            raise InvalidValue(
                f"layer={layer!r} was not seen; expected -1, the embedding, to {last}, the last."
            )
        if step not in steps:
            raise InvalidValue(
                f"step={step!r} was not seen; expected one of {min(steps)} to {max(steps)}."
            )
        output, x = (self.seen.at(key, step, device) for key in (layer, "x"))
        return self.model.predict_x0(output, x, self.times()[step], self.schedulers[step])

    def times(self) -> dict[int, Tensor]:
        """The timestep of each step, on the host.

        Raises:
            InvalidState: if nothing was seen.
        """
        if not self.seen.steps:
            raise InvalidState(NOTHING)
        if not self.known_times:
            seen = torch.stack([self.timesteps[s] for s in self.seen.steps]).cpu()
            self.known_times = dict(zip(self.seen.steps, seen, strict=True))
        return self.known_times

    def run(self, model: Any, labels: Any = None, **settings: Any) -> xr.Dataset:
        """Sample under observation, and compare with the finished latents; see `result`.

        Args:
            model: a `HookedDiT`, or what it wraps.
            labels: one an image; by default 16, classes or prompts in turn, two images of each.
            **settings: those of `dit_lens.sample`: steps, seeds, guidance, scheduler, ...
        """
        model = HookedDiT.of(model)
        if labels is None:
            labels = [i // 2 % model.conditions.n for i in range(16)]
        given = model.conditions.numbers(labels).tolist()
        alone = [label for label in given if given.count(label) == 1]
        if alone:
            raise InvalidValue(
                f"Label {alone[0]} stands once; expected each two times or more, since the mean of "
                "a label's images is taken off."
            )
        with trace(model, probes=[self]):
            run = sample(model, labels, **settings)
        return self.result(finished(run, len(self.seen.at("x", 0))))

    def of_run(self, run: Run, by_label: bool = True) -> xr.Dataset:
        """Go through a finished run, with its own edits: one forward for each step on its stored
        x_t, compared with its finished latents; see `result`.

        Args:
            run: what `dit_lens.sample` gave.
            by_label: as for `result`.
        """
        with trace(run.model, probes=[self]):
            for step in range(run.settings.steps):
                run.forward(step)
        return self.result(finished(run, len(self.seen.at("x", 0))), by_label)

    def labels_of(self, items: int) -> np.ndarray[Any, Any] | None:
        """The label of each item of the whole batch; None where one is not known.

        Args:
            items: how many the batch has.
        """
        labels = np.empty(items)
        for rows, own in self.labels.items():
            if own is None:
                return None
            labels[list(rows)] = own.expand(len(rows)).cpu().numpy()
        return labels

    def result(self, target: Tensor | None = None, by_label: bool = True) -> xr.Dataset:
        """How well each layer's x0 agrees with a target, band by band.

        Args:
            target: [batch, channel, height, width], the finished latents in the run's batch order;
                by default the last layer's own x0 at that step.
            by_label: whether the mean of each label by itself is taken off, and not that of the
                whole batch: what all images of a class share is no decision.

        Returns:
            Dataset with `xy`, `xx`, `yy` [layer, step, batch, band], band-wise products of lens and
            target, and `agreement` [layer, step, band], the correlation sum xy / sqrt(sum xx sum
            yy).

        Raises:
            RuntimeError: if nothing was seen.
            ValueError: for a target of another shape.
        """
        if not self.seen.steps:
            raise InvalidState(NOTHING)
        layers, steps = self.layers, self.seen.steps
        shape = self.seen.at("x", steps[0]).shape
        if target is not None and target.shape != shape:
            raise InvalidValue(
                f"LayerLens's target has shape {list(target.shape)}; the run's latents have "
                f"{list(shape)}."
            )
        centred = centring(self.labels_of(shape[0]) if by_label else None, shape[0])
        matrix = torch.from_numpy(centred)
        if target is not None:
            matrix = matrix.to(target.device)
        own = None if target is None else modes(target, self.bands, matrix)
        each: list[Tensor] = []
        for step in steps:
            last = own
            if last is None:
                last = modes(self.x0(layers[-1], step), self.bands, matrix)
            of_step = [
                products(
                    modes(self.x0(layer, step, last.device), self.bands, matrix),
                    last,
                    self.bands,
                )
                for layer in layers
            ]
            each.append(torch.stack(of_step, 1))
        found = torch.stack(each, 2).cpu().numpy()  # the device is waited for once
        # what a group of n loses with its mean is put back, so that sums over items are those of
        # `dit_lens.measures.agreement`; its rows are made for resampling, these are the items' own
        found *= (1 / np.diag(centred))[:, None]
        variables: dict[str, Any] = {
            name: (("layer", "step", "batch", "band"), found[i])
            for i, name in enumerate(("xy", "xx", "yy"))
        }
        xy, xx, yy = (variables[name][1].sum(2) for name in ("xy", "xx", "yy"))
        with np.errstate(invalid="ignore", divide="ignore"):
            variables["agreement"] = (("layer", "step", "band"), xy / np.sqrt(xx * yy))
        timesteps = [float(self.times()[s]) for s in steps]
        return xr.Dataset(
            variables,
            coords={
                "layer": layers,
                "step": steps,
                "band": list(self.bands.names),
                "timestep": ("step", timesteps),
            },
        )


def finished(run: Run, batch: int) -> Tensor:
    """A run's finished latents, [batch, ...]: with guidance, where the batch is [cond | null], once
    for each half.
    """
    return torch.cat([run.finished] * (batch // len(run.labels)))


def centring(labels: np.ndarray[Any, Any] | None, items: int) -> np.ndarray[Any, Any]:
    """The matrix [batch, batch] that takes the mean of its label off each item."""
    groups = np.zeros(items) if labels is None else labels
    alike = groups[:, None] == groups
    alone = np.flatnonzero(alike.sum(1) == 1)
    if len(alone):
        raise InvalidValue(
            f"Label {int(groups[alone[0]])} has one image; to remove a label's mean it needs two "
            "or more (by_label=False removes the mean of all)."
        )
    centred: np.ndarray[Any, Any] = np.eye(items) - alike / alike.sum(1, keepdims=True)
    return centred


def modes(x: Tensor, bands: Bands, centred: Tensor) -> Tensor:
    """Coefficients of latents in the bands' basis, less the mean of the item's label, [batch, ...,
    mode].
    """
    off = centred @ x.double().flatten(1)
    return bands.coefficients(off.view(x.shape))


def products(a: Tensor, b: Tensor, bands: Bands) -> Tensor:
    """⟨a, b⟩, |a|², |b|² of each item and band, from `modes`, [3, batch, band]."""
    found = torch.stack([(p * q).flatten(1, -2).sum(1) for p, q in ((a, b), (a, a), (b, b))])
    return bands.total(found)
