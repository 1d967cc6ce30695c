"""The peak of every phase before it runs, by tracing the real code; the fastest strategy that fits a budget."""
