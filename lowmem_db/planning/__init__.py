"""Predicts the peak memory of every phase by tracing the real code, and finds the fastest strategy for a budget."""
