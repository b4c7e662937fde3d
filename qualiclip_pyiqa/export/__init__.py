"""Write a metric to one file that other programs run without this package: ONNX, or PyTorch's .pt2."""
