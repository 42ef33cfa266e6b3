"""picks.jsonl: what every method showed to every query of the evaluation, and what came of it.

One line a query, method and number of shots, and a draw of the methods with chance:

  query_id, method, shots, draw   draw counts seeds from 0; zero-shot has 0 shots, once
  demonstrations                  ids in prompt order, the last next to the question
  pointer_pos                     the same as positions in the query's pool
  prompt_hash                     equal where two runs showed the same prompt
  output                          the VLM's answer; null where there is none
  accuracy, accuracy_official     VQA accuracy, `normalized` and `official_2021`, [0, 1]
  gt_prob                         vqa_gt_prob, [0, 1]
  confidence                      the VLM's probability of its own answer, its end included
  how                             `verified` by its scores or `generated`
  eval_failed                     why there is no answer; null where there is one
  query_hash, dataset, model      which query, data set and VLM

`prompt_hash` is over the template's hash, the demonstrations' image keys, questions and shown
answers in order, and the query's image key and question: everything that the prompt builder reads.
It leaves the VLM out, so that two VLMs can be seen to have been shown the same prompt; whether it
was the same VLM, `model` says (its weights, tokenizer and image settings). Pictures count by key,
not by pixel. `query_hash` is over the query's image key, question and the annotators' answers.
All hashes are the first 16 hexadecimal digits of a SHA-256.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from lever_jax.evaluation import Picked
from lever_jax.pooled import PooledQueries
from lever_jax.store import ScoreRecord
from qwen_bridge.vqa.examples import Dataset, Example

_DIGITS = 16


class PickLines:
    """Turns picks into lines.

    Args:
      write: takes text.
      queries: the evaluation queries.
      dataset: the examples behind the ids.
      identity: of the session: model, prompt_template, dataset.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        queries: PooledQueries,
        dataset: Dataset,
        identity: Mapping[str, str],
    ):
        self._write, self._queries, self._dataset = write, queries, dataset
        self._template = identity["prompt_template"]
        self._asked = {
            int(id): dataset.example("query", int(id)) for id in queries.query_ids.tolist()
        }
        self._hashes = {id: query_hash(query) for id, query in self._asked.items()}
        self._run = {
            "dataset": identity["dataset"][:_DIGITS],
            "model": _hash(identity["model"]),
        }

    def __call__(self, picked: Picked) -> None:
        """Writes the lines of one draw of a method."""
        lines = []
        for action, record in zip(picked.answered.pointers.tolist(), picked.answered.records):
            shown = [self._dataset.example("bank", int(id)) for id in record.pointer]
            query = self._asked[record.query_id]
            line = {
                "query_id": record.query_id,
                "method": picked.method,
                "shots": picked.shots,
                "draw": picked.draw,
                "demonstrations": list(record.pointer),
                "pointer_pos": [a for a in action if a >= 0],
                "prompt_hash": prompt_hash(self._template, shown, query),
                **_outcome(record),
                "query_hash": self._hashes[record.query_id],
                **self._run,
            }
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False))
        self._write("".join(f"{line}\n" for line in lines))


def prompt_hash(template: str, demonstrations: list[Example], query: Example) -> str:
    """Identifies a prompt by what it is built from, see the module's text.

    Args:
      template: hash of the template and its instruction.
      demonstrations: in prompt order.
      query: its answers are not read.
    """
    shown = [[d.image, d.question.strip(), d.answer.strip()] for d in demonstrations]
    return _hash([template, shown, [query.image, query.question.strip()]])


def query_hash(query: Example) -> str:
    """Identifies a query: its picture's key, its question and its annotators' answers."""
    return _hash([query.image, query.question, list(query.answers)])


def _outcome(record: ScoreRecord) -> dict[str, Any]:
    failed = record.eval_failed is not None
    answered = {
        "output": record.prediction,
        "accuracy": record.accuracy,
        "accuracy_official": record.accuracy_official,
        "gt_prob": record.gt_prob,
        "confidence": record.confidence,
        "how": record.how,
    }
    # A prompt whose scoring went well and whose answer failed has no result, as in eval.json.
    return {**(dict.fromkeys(answered) if failed else answered), "eval_failed": record.eval_failed}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:_DIGITS]
