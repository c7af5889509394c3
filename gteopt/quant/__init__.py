"""The numerics of quantization: functions of tensors that know no model and no file."""
