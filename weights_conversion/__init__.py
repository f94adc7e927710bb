"""Weights from other frameworks, as tables of names and layouts."""
