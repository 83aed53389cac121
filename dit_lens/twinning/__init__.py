"""Twins: two trajectories tied together and then released.

Belongs here: running pairs, the ties between them, the coupling through attention. Does not: what
is concluded from them (`experiments`).
"""
