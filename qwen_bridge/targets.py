"""What a query's ground truth looks like to the scorer: answer branches as token lists."""

import dataclasses

import numpy as np

from qwen_bridge.prompts import PromptBuilder, PromptError
from qwen_bridge.vqa.answers import answer_targets


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerBranches:
    """The ground truths of one query.

    Attributes:
      texts: the unique ground truths, normalised; `A` of them.
      weights: float64 `[A]`, w(a).
      forms: tokens of each surface form, the end of the turn included; `F` of them.
      form_texts: the surface forms as text.
      form_answer: int64 `[F]`, which ground truth a form spells.
    """

    texts: tuple[str, ...]
    weights: np.ndarray
    forms: tuple[tuple[int, ...], ...]
    form_texts: tuple[str, ...]
    form_answer: np.ndarray


def answer_branches(answers, builder: PromptBuilder, weight: str) -> AnswerBranches:
    """Tokenises the ground truths of a query.

    Forms that tokenise alike are one branch, so that no probability counts twice.

    Args:
      answers: the annotators' raw answers.
      builder: tokenises an answer.
      weight: `count3` or `official`, see `answer_targets`.

    Raises:
      PromptError: no answer can be shown.
    """
    targets = answer_targets(answers, weight)
    forms: dict[tuple[int, ...], tuple[str, int]] = {}
    for index, target in enumerate(targets):
        for text in target.forms:
            forms.setdefault(builder.answer(text), (text, index))
    if not forms:
        raise PromptError("the query has no answer that could be scored")
    return AnswerBranches(
        texts=tuple(target.text for target in targets),
        weights=np.array([target.weight for target in targets]),
        forms=tuple(forms),
        form_texts=tuple(text for text, _ in forms.values()),
        form_answer=np.array([index for _, index in forms.values()]),
    )
