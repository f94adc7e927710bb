"""Weights from other frameworks: files, tables of names and layouts, and the configuration that shapes tell."""
