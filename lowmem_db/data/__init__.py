"""Photos to records, crops, order, batches, identifiers. A tokenizer is passed in; models are not known here."""
