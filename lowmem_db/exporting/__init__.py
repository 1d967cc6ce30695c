"""Taking a trained model elsewhere: diffusers' folder, one file in the original layout. Knows nothing of training."""
