"""The built-in probes.

Belongs here: measurements written as yours would be, with dit_lens's public names only. Does not:
what is concluded from several of them (`experiments`).

- `SpectralSplit`: band energies of any hook point.
- `TwinDivergence`: how far twins differ, by layer, band and step, and when each layer has settled.
- `LayerLens`: each layer's stream read through the final layer.
- `TwinPatching`: one twin's activations put into the other, exactly, over layers, sites and steps.
"""

from .layer_lens import LayerLens
from .spectral_split import SpectralSplit
from .twin_divergence import TwinDivergence
from .twin_patching import TwinPatching

__all__ = ["LayerLens", "SpectralSplit", "TwinDivergence", "TwinPatching"]
