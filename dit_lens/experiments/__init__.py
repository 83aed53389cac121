"""What is measured: the gap, commitment by release step, layer profiles, coupling sweeps,
knock-outs.

Belongs here: a question, the runs that answer it, and the dataset and sentence that come out. Does
not: statistics (`measures`), pictures (`report`), single interventions (`patching`).
"""
