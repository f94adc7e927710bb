"""Prediction on the native grid, metrics with their definitions in their names, and the report."""
