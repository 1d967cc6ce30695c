"""Photos become records, crops and an order; rare tokens become identifiers. Nothing here knows a model."""
