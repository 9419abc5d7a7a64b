"""SAM 2.1: prompted masks in images and through videos (Ravi et al., 2024, arXiv:2408.00714).

`model.py` joins the parts and says what one frame goes through, `memory.py` what a frame remembers of others,
`tracker.py` follows objects through a video, `training.py` and `prompts.py` play the user in training.
"""
