"""Leaving PyTorch: ONNX files that hold the whole sampler, torch.export and AOTInductor packages.

Nothing is imported here: `export.run` needs only numpy, pillow and onnxruntime.
"""
