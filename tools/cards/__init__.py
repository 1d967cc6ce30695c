"""From the reports in ``benchmarks/results/cards``: tables for the docs, and figures for the planner."""
