"""Measuring results: encoders, the metrics of arXiv:2208.12242, the paper's protocol, and its questionnaire."""
