"""Names and hook points: what can be listened to, and the edits that can be made there.

Belongs here: the meaning of a name, a point, a region, an edit, a pass. Does not: which points a
particular model has (`families`), and installing them (`model`).
"""
