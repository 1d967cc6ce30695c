"""Techniques that save memory. Each has an ``apply(model)`` that returns the function that undoes it."""
