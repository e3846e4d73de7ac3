"""Trained networks as files for other programs: ONNX, safetensors, torch.export, hub folders.

``export.py`` is :func:`cure.export`; one file a format.  What is read back is in
:mod:`cure.models.artefact`, and :func:`cure.evaluate` takes it as a target.
"""
