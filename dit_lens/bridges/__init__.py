"""Bridges to other tools' ways of opening a model; each imports its tool when it is called.

Belongs here: nnsight and TransformerLens over a `HookedDiT`. Does not: anything that dit_lens needs
itself; neither tool is a dependency.
"""
