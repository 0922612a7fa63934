"""What metrics are called in tables and figures, whatever set of them a summary holds."""

from __future__ import annotations

from collections.abc import Sequence

# Names of one word, and first words of names `<word>_<feature space>`: (title, whether lower is better).
DISTANCES = {
    "fid": "Frechet Inception distance",
    "sfid": "Frechet distance in spatial Inception features",
    "fd": "Frechet distance",
    "kid": "Kernel distance",
}
SCORES = {
    "inception_score": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
    "clip_score": "CLIP score",
}
SPACES = {
    "digits": "classifier features",
    "patches": "patches at full resolution",
    "dinov2": "DINOv2 features",
}
FULL_RESOLUTION = "fd_patches"  # which sees what a feature space at a low resolution cannot


def lower_is_better(metric: str) -> bool | None:
    """The better direction by the metric's name; None where the name does not say it."""
    if _first_word(metric, DISTANCES):
        return True
    return False if _first_word(metric, SCORES) else None


def short_title(metric: str) -> str:
    """`Frechet distance in classifier features` for fd_digits; an unknown name with spaces for its underscores."""
    known = DISTANCES | SCORES
    first = _first_word(metric, known)
    if not first:
        return metric.replace("_", " ")
    space = metric[len(first) + 1 :]
    return known[first] + (f" in {SPACES.get(space, f'{space} features')}" if space else "")


def title(metric: str) -> str:
    """The short title with the metric's key and its better direction."""
    direction = {True: "lower is better", False: "higher is better", None: ""}[lower_is_better(metric)]
    short = short_title(metric)
    notes = [note for note in ("" if short.lower() == metric else metric, direction) if note]
    return f"{short} ({', '.join(notes)})" if notes else short


def companions(metric: str, metrics: Sequence[str]) -> list[str]:
    """What must stand beside a feature distance: recall, and a distance at full resolution.

    A distance in features falls when an arm makes fewer kinds of images well, or leaves noise that the features do not
    see; each of the two shows one of these.
    """
    first = _first_word(metric, DISTANCES)
    if not first:
        return []
    space = metric[len(first) + 1 :]
    recalls = [f"recall_{space}", "recall", *(name for name in metrics if name.startswith("recall_"))]
    found = [name for name in recalls if name in metrics][:1]
    return [*found, FULL_RESOLUTION] if FULL_RESOLUTION in metrics and metric != FULL_RESOLUTION else found


def _first_word(metric: str, known: dict[str, str]) -> str:
    """The known name that a metric's name is, or begins with before an underscore; "" if there is none."""
    fitting = [name for name in known if metric == name or metric.startswith(f"{name}_")]
    return max(fitting, key=len, default="")
