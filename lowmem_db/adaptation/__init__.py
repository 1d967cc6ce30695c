"""What trains: all weights, or low-rank adapters beside frozen ones."""
