"""Datasets, volumes, prompts and preprocessing, in numpy."""
