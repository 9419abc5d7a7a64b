"""RF-DETR with masks: boxes, classes and a mask for each object, from a real-time detection transformer.

`model.py` puts together, in the order of the forward pass, `encoder.py`, `projector.py`, `proposals.py`, `decoder.py`
(with `attention.py`) and `masks.py`; `variants.py` holds the published sizes and `keys.py` their checkpoints' names.
"""
