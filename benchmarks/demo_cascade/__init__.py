"""The recipe of a small pixel cascade in the layout of DeepFloyd IF."""
