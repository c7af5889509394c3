"""The numerics of quantization: tensors in, tensors out; knows no model and no file."""
