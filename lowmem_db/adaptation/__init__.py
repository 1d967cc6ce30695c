"""What trains: all weights, low-rank adapters on frozen ones, or the embedding of a new word."""
