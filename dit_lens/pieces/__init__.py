"""Measurements as lists of pure pieces, kept as they finish, and run wherever there is room.

A measurement asks for the `results` of the pieces that it needs next, and goes on with them. How
they come about is settled around it (`dit_lens.pieces.kept`): by itself it runs them here and
now; with a store it keeps each as it finishes and never runs it again; with an engine other
processes run them. A process that helps runs the same measurement on the same store: it takes the
pieces that nobody has taken, waits for the others, and so comes to the same next list. So a
measurement may choose its next pieces by what the last ones gave, and nothing has to be sent but
arrays.

Belongs here: stores, claims, engines. Does not: what a piece computes.
"""

from .content import content, digest
from .datasets import flat, whole
from .engines import Engine, checked_engine
from .kept import about_of, kept_in, measured, working
from .store import NEEDED, Arrays, Store, has_zarr, read_root
from .work import Piece, current, enough, helped, helping, quiet, results, scope

__all__ = [
    "NEEDED",
    "Arrays",
    "Engine",
    "Piece",
    "Store",
    "about_of",
    "checked_engine",
    "content",
    "current",
    "digest",
    "enough",
    "flat",
    "has_zarr",
    "helped",
    "helping",
    "kept_in",
    "measured",
    "quiet",
    "read_root",
    "results",
    "scope",
    "whole",
    "working",
]
