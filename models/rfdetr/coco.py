"""The classes of COCO by their ids, which are the labels of the official weights."""

from __future__ import annotations

GAPS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # ids that no class has
NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
"""


def coco_names() -> list[str]:
    """91 names, empty at ids that no class has."""
    names = iter(" ".join(NAMES.split()).split(", "))
    return ["" if number in GAPS else next(names) for number in range(91)]
