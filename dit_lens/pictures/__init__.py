"""Pictures of results, as matplotlib axes.

Belongs here: how one panel of a result looks, by its variables alone. Does not: what is measured,
or which pictures a command writes (`report`).
"""
