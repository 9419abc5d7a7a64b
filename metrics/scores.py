"""The field's scores of a binary mask by name: what each is, which way is better, and how else it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from errors import UserError, nearest
from metrics.boundary import biou_curve, boundary_iou, mean_boundary_accuracy, multi_scale_iou
from metrics.hce import human_correction_effort
from metrics.matting import connectivity_error, gradient_error, mad, mse, sad
from metrics.pair import HALF, Counts, Pair
from metrics.saliency import (
    accuracy,
    balanced_error,
    dice,
    e_measure,
    f_measure,
    iou,
    kappa,
    mean_absolute_error,
    mean_squared_error,
    precision,
    recall,
    s_measure,
    s_measure_birefnet,
    specificity,
    weighted_f,
)


@dataclass(frozen=True)
class Score:
    """A number from a `Pair`, or, where a `curve` is named, from that curve: of a sample, or the mean of many."""

    value: Callable[[Any], float]
    higher_is_better: bool = True
    curve: str = ""
    maybe_undefined: bool = False  # NaN for some samples, which are then left out of the mean


OF_COUNTS: dict[str, tuple[Callable[[Counts], np.ndarray], bool]] = {
    "f": (f_measure, True),
    "e": (e_measure, True),
    "iou": (iou, True),
    "dice": (dice, True),
    "precision": (precision, True),
    "recall": (recall, True),
    "specificity": (specificity, True),
    "oa": (accuracy, True),
    "kappa": (kappa, True),
    "ber": (balanced_error, False),
}


def counted(name: str) -> dict[str, Score]:
    """A score of the four counts at the best and at all 256 thresholds, at the adaptive one, and above one half."""
    formula, higher = OF_COUNTS[name]
    return {
        f"max_{name}": Score(np.max, higher, curve=name),
        f"mean_{name}": Score(np.mean, higher, curve=name),
        f"adaptive_{name}": Score(lambda pair: float(formula(pair.at(pair.adaptive))), higher),
        f"binary_{name}": Score(lambda pair: float(formula(pair.at(pair.half))), higher),
    }


def curve_of(name: str) -> Callable[[Pair], np.ndarray]:
    formula, _ = OF_COUNTS[name]
    return lambda pair: formula(pair.curve)


CURVES = {**{name: curve_of(name) for name in OF_COUNTS}, "biou_birefnet": biou_curve}

SCORES = {
    "s_measure": Score(s_measure, maybe_undefined=True),
    "weighted_f": Score(weighted_f),
    **counted("f"),
    **counted("e"),
    "normalized_mae": Score(mean_absolute_error, False),
    "normalized_mse": Score(mean_squared_error, False),
    "hce": Score(lambda pair: human_correction_effort(pair, pair.mask(pair.half)), False),
    "boundary_iou": Score(boundary_iou, maybe_undefined=True),
    "mba": Score(lambda pair: mean_boundary_accuracy(pair, pair.mask(pair.half)), maybe_undefined=True),
    **{name: score for family in list(OF_COUNTS)[2:] for name, score in counted(family).items()},
    "adaptive_msiou": Score(lambda pair: multi_scale_iou(pair, pair.mask(pair.adaptive))),
    "binary_msiou": Score(lambda pair: multi_scale_iou(pair, pair.mask(pair.half))),
    "s_measure_birefnet": Score(s_measure_birefnet),
    "hce_birefnet": Score(lambda pair: human_correction_effort(pair, pair.mask(HALF + 1), whole_image=0), False),
    "mba_birefnet": Score(lambda pair: mean_boundary_accuracy(pair, pair.mask(HALF + 1)), maybe_undefined=True),
    "max_biou_birefnet": Score(np.max, curve="biou_birefnet"),
    "mean_biou_birefnet": Score(np.mean, curve="biou_birefnet"),
    "sad": Score(sad, False),
    "mad": Score(mad, False),
    "matting_mse": Score(mse, False),
    "grad": Score(gradient_error, False),
    "conn": Score(connectivity_error, False),
}

GROUPS = {
    "standard": ["s_measure", "weighted_f", "max_f", "mean_f", "adaptive_f", "max_e", "mean_e", "adaptive_e",
                 "normalized_mae", "normalized_mse", "hce", "boundary_iou", "mba"],
    "birefnet": ["s_measure_birefnet", "weighted_f", "max_f", "mean_f", "adaptive_f", "max_e", "mean_e", "adaptive_e",
                 "normalized_mae", "normalized_mse", "hce_birefnet", "mba_birefnet", "max_biou_birefnet",
                 "mean_biou_birefnet"],
    "matting": ["sad", "mad", "matting_mse", "grad", "conn"],
    "all": list(SCORES),
}  # fmt: skip


def field_scores(
    prediction: np.ndarray, truth: np.ndarray, names: Iterable[str]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(scores, curves) of one (H, W) uint8 prediction against an (H, W) uint8 truth, for `names` of `SCORES`.

    The curves, (256,) float64 at thresholds from 255 down to 0, are those that the chosen scores are taken from.
    """
    pair = Pair(prediction, truth)
    chosen = {name: SCORES[name] for name in names}
    curves = {curve: CURVES[curve](pair) for curve in {score.curve: 0 for score in chosen.values() if score.curve}}
    scores = {name: float(score.value(curves[score.curve] if score.curve else pair)) for name, score in chosen.items()}
    return scores, curves


# ---------------------------------------------------------------- names as people write them

WORDS = {"f": ["f", "fm", "fmeasure", "fbeta"], "e": ["e", "em", "emeasure"], "dice": ["dice", "f1"],
         "oa": ["oa", "accuracy"]}  # fmt: skip
KINDS = {"max": ["max"], "mean": ["mean", "avg"], "adaptive": ["adaptive", "adp"], "binary": ["binary", "bin"]}
ABBREVIATIONS = {
    "s": "s_measure", "sm": "s_measure", "salpha": "s_measure", "wf": "weighted_f", "wfm": "weighted_f",
    "wfmeasure": "weighted_f", "weightedfm": "weighted_f", "em": "mean_e", "mae": "normalized_mae",
    "mse": "normalized_mse", "biou": "boundary_iou", "maxbiou": "max_biou_birefnet", "meanbiou": "mean_biou_birefnet",
}  # fmt: skip


# What the tables of the field call a score: the short names understood above, in their usual case.
HEADINGS = {
    "jaccard": "Jaccard", "dice": "Dice", "iou": "IoU", "ssim": "SSIM", "mae": "soft MAE",
    "s_measure": "Sm", "weighted_f": "wFm", "normalized_mae": "MAE", "normalized_mse": "MSE", "hce": "HCE",
    "boundary_iou": "BIoU", "mba": "mBA", "sad": "SAD", "mad": "MAD", "grad": "Grad", "conn": "Conn",
    **{f"{kind}_{family}": short + word for kind, short in
       {"max": "max", "mean": "mean", "adaptive": "adp", "binary": "bin"}.items() for family, word in
       {"f": "Fm", "e": "Em", "iou": "IoU", "dice": "Dice", "oa": "OA", "ber": "BER"}.items()},
}  # fmt: skip


def plain(name: str) -> str:
    """A name without case and separators."""
    return name.casefold().replace("_", "").replace("-", "").replace(" ", "")


def spellings() -> dict[str, str]:
    """Score names by everything, made `plain`, that they may be called: adpEm, E-measure_adp, emAdp ..."""
    known = {plain(name): name for name in SCORES} | ABBREVIATIONS
    for name in SCORES:
        kind, _, family = name.partition("_")
        for short in KINDS.get(kind, []):
            for word in WORDS.get(family, [family]):
                known |= {plain(short + word): name, plain(word + short): name}
    return known


SPELLINGS = spellings()


def resolve(names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Names of scores, each once, from names, abbreviations and groups in any case; `others` are known as they are.

    An unknown name is a `UserError`.
    """
    known = {**{plain(name): [name] for name in others}, **{word: [name] for word, name in SPELLINGS.items()}, **GROUPS}
    chosen: dict[str, None] = {}
    for name in names:
        if plain(name) not in known:
            candidates = [*GROUPS, *SCORES, *others]
            raise UserError(f"unknown metric {name!r}{nearest(name, candidates)}; metrics: {', '.join(candidates)}")
        chosen |= dict.fromkeys(known[plain(name)])
    return list(chosen)
