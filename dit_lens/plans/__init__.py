"""Reuse plans: which computations of a denoising run are skipped, their files, and running them.

Belongs here: the plan as data, its cost, and what really leaves the computation out. Does not: how
a plan is found (`experiments`).
"""
