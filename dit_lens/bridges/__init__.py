"""Bridges to other tools' ways of opening a model; each imports its tool when it is called."""
