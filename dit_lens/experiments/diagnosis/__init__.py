"""Diagnosis: in which layer and at which step a fault of an image arises, and its repair.

Belongs here: the stages of `dit_lens.experiments.diagnose`, one a file. Does not: patches
(`patching`), edits on disk (`hooks.stored_edits`), pictures (`report`).

- `fault`: what counts as a fault, as a score of images.
- `chances`: how often it comes over seeds, and by when in the run it is decided.
- `pairs`: good runs to compare with: given, or near twins that are found.
- `prober`: patches both ways between good and bad, and what they do to the fault.
- `where`: in which layers and steps, from coarse to fine.
- `inside`: which part, heads and tokens of the layer.
- `repair`: edits that take the fault away, and what else they do.
- `verdict`: what it comes to, in words.
"""
