"""One denoising loop: settings, noise, guidance, schedulers, and the run that is kept.

Belongs here: what one denoising step is and how steps make a run that can be replayed. Does not:
pairs of runs (`twinning`), interventions beyond a list of hooks (`patching`).
"""
