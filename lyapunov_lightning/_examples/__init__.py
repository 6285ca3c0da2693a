"""Stands for the top-level folder ``examples``, which the wheel holds in this place."""
