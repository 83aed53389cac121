"""One hooked transformer: `HookedDiT`, and what puts hook points into a model and takes them out.

Belongs here: opening, calling, loading and closing a model, and its conditions. Does not: how a
particular model computes (`families`), anything that spans denoising steps (`sampling`, `tracing`).
"""
