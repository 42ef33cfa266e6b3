"""The report's gallery: queries that improved, got worse and stayed wrong, with their pictures."""

import base64
import io
import json
import pathlib
from typing import Any

import numpy as np

from lever_jax.evaluation import METRICS, best_similarity
from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset

KINDS = {
    "improved": "Improved: wrong with similarity, right with the selector",
    "worse": "Got worse: right with similarity, wrong with the selector",
    "wrong": "Stayed wrong with both",
}
EACH = 4
_THUMBNAIL, _SMALL, _QUALITY = 168, 96, 80


def gallery(
    workdir: pathlib.Path, evaluation: dict[str, Any], dataset: Dataset | None
) -> dict[str, Any] | None:
    """Some queries of each kind, at the largest number of shots.

    A query improved if its accuracy rose from the best similarity to the last selector, got worse
    if it fell, and stayed wrong if it was 0 with both. Of each kind, queries are taken at equal
    steps through all of them, by id, so that the choice favours none.

    Returns:
      similarity, selector (method names), shots, counts by kind, and cards by kind; None where
      picks.jsonl or a pair of methods is missing.
    """
    path = workdir / "picks.jsonl"
    shots = max(evaluation["shots"], key=int, default=None)
    if shots is None or not path.is_file():
        return None
    table = evaluation["shots"][shots]
    known = [f"selector_{phase}" for phase in ("grpo", "rce", "warmup")]
    selector = next((name for name in known if name in table), None)
    similarity = best_similarity(table)
    if selector is None or similarity is None:
        return None
    picks = _read(path, (similarity, selector), int(shots))
    accuracy = METRICS[evaluation["metric"]]
    by_kind: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for query_id in sorted(picks[similarity].keys() & picks[selector].keys()):
        before, after = (picks[name][query_id][accuracy] for name in (similarity, selector))
        if before is None or after is None:
            continue
        if after > before:
            by_kind["improved"].append(query_id)
        elif after < before:
            by_kind["worse"].append(query_id)
        elif after == 0:
            by_kind["wrong"].append(query_id)
    pictures = _Pictures(dataset)
    cards = {
        kind: [
            _card(query_id, {name: picks[name][query_id] for name in picks}, accuracy, pictures)
            for query_id in _spread(ids)
        ]
        for kind, ids in by_kind.items()
    }
    return {
        "similarity": similarity,
        "selector": selector,
        "shots": int(shots),
        "counts": {kind: len(ids) for kind, ids in by_kind.items()},
        "cards": cards,
        "missing_pictures": pictures.missing,
    }


def _read(path: pathlib.Path, methods: tuple[str, str], shots: int) -> dict[str, dict[int, dict]]:
    """The first draw of two methods, by method and query."""
    picks: dict[str, dict[int, dict]] = {name: {} for name in methods}
    with path.open(encoding="utf-8") as stream:
        for text in stream:
            line = json.loads(text)
            if line["method"] in picks and line["shots"] == shots and line["draw"] == 0:
                picks[line["method"]][line["query_id"]] = line
    return picks


def _spread(ids: list[int]) -> list[int]:
    if len(ids) <= EACH:
        return ids
    return [ids[i] for i in np.linspace(0, len(ids) - 1, EACH).round().astype(int)]


def _card(query_id: int, picks: dict[str, dict], accuracy: str, pictures) -> dict[str, Any]:
    query = pictures.example("query", query_id)
    return {
        "query_id": query_id,
        "image": pictures.of(query),
        "question": query.question if query else None,
        "answers": list(dict.fromkeys(query.answers)) if query else [],
        "picks": [
            {
                "method": name,
                "output": line["output"],
                "accuracy": line[accuracy],
                "gt_prob": line["gt_prob"],
                "demonstrations": [
                    {
                        "id": demo_id,
                        "image": pictures.of(demo),
                        "question": demo.question if demo else None,
                        "answer": demo.answer if demo else None,
                    }
                    for demo_id in line["demonstrations"]
                    for demo in [pictures.example("bank", demo_id)]
                ],
            }
            for name, line in picks.items()
        ],
    }


class _Pictures:
    """Thumbnails as data URIs; a picture that cannot be read is counted and left out."""

    def __init__(self, dataset: Dataset | None):
        self._dataset, self._made, self.missing = dataset, {}, 0

    def example(self, kind: str, id: int):
        if self._dataset is None:
            return None
        try:
            return self._dataset.example(kind, id)
        except InputError:
            return None

    def of(self, example) -> str | None:
        if example is None:
            self.missing += 1
            return None
        if example.image not in self._made:
            self._made[example.image] = self._thumbnail(example.image)
        self.missing += self._made[example.image] is None
        return self._made[example.image]

    def _thumbnail(self, key: str) -> str | None:
        try:
            image = self._dataset.load_image(key).convert("RGB")
        except (InputError, OSError):
            return None
        small = max(image.size) <= _SMALL
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        stream = io.BytesIO()
        image.save(stream, "PNG" if small else "JPEG", **({} if small else {"quality": _QUALITY}))
        kind = "png" if small else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
