"""What saves memory around a model. Each technique is ``apply(model)``, which returns the function that undoes it."""
