"""Interventions on a denoising run: patches, exact sweeps of them, paths, attribution.

Belongs here: what a patch is, and ways to run many of them. Does not: what is concluded about the
gap (`experiments`).
"""
