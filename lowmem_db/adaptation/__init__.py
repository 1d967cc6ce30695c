"""What trains: all weights, or low-rank adapters on frozen ones."""
