"""Stored results as tables, sentences and pictures.

Belongs here: what a result looks like on paper and on the terminal, and reading stored results
back. Does not: computing anything that is not in the result; that is `experiments`.
"""
