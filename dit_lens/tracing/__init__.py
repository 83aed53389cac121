"""A denoising run under observation: the trace, what it keeps, how it is recomputed and stored;
probes.

Belongs here: recording, recomputing, files and datasets of traces, the `Probe` base class. Does
not: the built-in probes (`dit_lens.probes`), the hook points themselves (`hooks`, `model`).
"""
