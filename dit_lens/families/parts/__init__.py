"""The kit that families are built of: attention, joint sequences, layers, the names of sites.

Belongs here: what two families or more share, named for the trait they share. Does not: a whole
family.
"""
