"""Photos, captions, crops, order, batches, identifiers. Knows nothing about models; a tokenizer is passed in."""
