"""Trains the embedded VLM: a small real Qwen2.5-VL that learns to use its context.

    python -m experiments.pretrain_tiny_qwen --out=qwen_bridge/tiny_qwen --workdir=runs/pretrain

Every sequence shows zero to four demonstrations and a query, in one language or in several; the
border's colour says nothing here, so the language must be read off the demonstrations. Only the
handwritten digits of demonstrations and training queries are drawn, never an evaluation picture.
The loss falls on answers that the context determines. It checkpoints and resumes.
"""

import json
import pathlib
import time

import numpy as np
import torch
from absl import app, flags
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from experiments.tiny_checkpoint import make_model, write_tokenizer
from qwen_bridge.positions import segment_positions
from qwen_bridge.prompts import PromptBuilder, PromptTemplate
from qwen_bridge.vision import batch_equal_windows
from qwen_bridge.vqa import digits
from qwen_bridge.vqa.examples import Example
from qwen_bridge.vqa.languages import NUMBER_WORDS

_OUT = flags.DEFINE_string("out", None, "Folder for the finished checkpoint.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/pretrain", "Folder for resumable checkpoints.")
_STEPS = flags.DEFINE_integer("steps", 8000, "Optimiser steps.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 192, "Question-answer turns in a batch.", lower_bound=5)
_RATE = flags.DEFINE_float("learning_rate", 1.5e-3, "Peak learning rate of AdamW.")
_WARMUP = flags.DEFINE_integer("warmup_steps", 200, "Steps of linear warm-up.")
_ONE_LANGUAGE = flags.DEFINE_float("one_language", 0.6, "Share of sequences in one language.")
_FOLLOW_LAST = flags.DEFINE_float(
    "follow_last", 0.7, "In mixed sequences, how often the query follows the last demonstration."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.")
_THREADS = flags.DEFINE_integer("threads", 2, "Torch threads.", lower_bound=1)
_EVERY = flags.DEFINE_integer("every", 500, "Steps between validations and checkpoints.")

_VALIDATION_DIGITS = 60  # of the training queries' digits, held out of pretraining
_MAX_DEMONSTRATIONS = 4
_FIRST_TURN_WEIGHT = 0.1  # nothing determines the first answer's language
_STYLES = ("chat", "inline")
_INLINE_SHARE = 0.15


def pretraining_rows() -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of the handwritten digits for training and for validation."""
    train = digits.split_rows("train")
    rows = np.concatenate([digits.split_rows("bank"), train[:-_VALIDATION_DIGITS]])
    return rows, train[-_VALIDATION_DIGITS:]


def draw_sequence(turns: int, rows, rng, *, one_language: float, follow_last: float):
    """Draws one sequence.

    Returns:
      examples: the turns, the last one the query.
      weights: loss weight of each turn's answer.
      labels: row of the handwritten digit of each turn.
    """
    names = sorted(NUMBER_WORDS)
    if rng.random() < one_language or turns == 1:
        languages = [names[rng.integers(len(names))]] * turns
        weights = [_FIRST_TURN_WEIGHT] + [1.0] * (turns - 1)
    else:
        pair = rng.choice(len(names), 2, replace=False)
        shown = [names[pair[rng.integers(2)]] for _ in range(turns - 1)]
        follow = shown[-1] if rng.random() < follow_last else shown[rng.integers(len(shown))]
        languages = [*shown, follow]
        weights = [0.0] * (turns - 1) + [1.0]
    picked = rows[rng.integers(len(rows), size=turns)]
    examples = []
    for language, row in zip(languages, picked):
        kind, number = digits.ask(int(digits.handwritten()[1][row]), rng)
        examples.append(
            Example(
                id=int(row),
                image=str(row),
                question=digits.QUESTIONS[kind][0],
                answers=(NUMBER_WORDS[language][number],),
            )
        )
    return examples, weights, picked


class Batches:
    """Makes padded batches of sequences, all of one number of turns."""

    def __init__(self, tokenizer, processor, rows, one_language, follow_last):
        self._builders = [PromptBuilder(tokenizer, PromptTemplate(style)) for style in _STYLES]
        self._pad = tokenizer.pad_token_id
        self._processor, self._rows = processor, rows
        self._one_language, self._follow_last = one_language, follow_last

    def draw(self, count: int, turns: int, rng, *, style: str | None = None) -> dict:
        """Returns input_ids `[B, L]`, positions `[3, B, L]`, targets, weights, turn, pixels."""
        ids, positions, targets, weights, which, rows = [], [], [], [], [], []
        for _ in range(count):
            examples, turn_weights, picked = draw_sequence(
                turns,
                self._rows,
                rng,
                one_language=self._one_language,
                follow_last=self._follow_last,
            )
            inline = rng.random() < _INLINE_SHARE if style is None else style == "inline"
            builder = self._builders[int(inline)]
            if inline:
                turn_weights = [0.0] * (turns - 1) + turn_weights[-1:]
            sequence, spans = self._tokens(builder, examples)
            weight = np.zeros(len(sequence), np.float32)
            turn = np.full(len(sequence), -1)
            for i, (low, high) in enumerate(spans):
                weight[low - 1 : high - 1] = turn_weights[i]
                turn[low - 1 : high - 1] = i
            ids.append(sequence)
            targets.append(np.append(sequence[1:], self._pad))
            weights.append(weight)
            which.append(turn)
            # One picture is one token, so the three coordinates advance together.
            positions.append(segment_positions(sequence, -1, None, 0)[0])
            rows.append(picked)
        rows = np.concatenate(rows)
        colours = digits.border_colours()[rng.integers(digits.NUM_COLOURS, size=len(rows))]
        pictures = digits.render(digits.handwritten()[0][rows], colours, rng)
        processed = self._processor(images=list(pictures), return_tensors="pt")
        return {
            "input_ids": _pad(ids, self._pad),
            "position_ids": torch.stack([_pad([p[i] for p in positions], 0) for i in range(3)]),
            "targets": _pad(targets, self._pad),
            "weights": _pad(weights, 0.0),
            "turn": _pad(which, -1),
            "pixel_values": processed["pixel_values"],
            "grids": processed["image_grid_thw"],
        }

    def _tokens(self, builder, examples):
        """Returns a sequence's tokens and the span of each turn's answer, the end included."""
        segments = builder.segments(examples[:-1], examples[-1])
        answer = builder.answer(examples[-1].answer)
        sequence, spans = [], []
        for segment, example in zip(segments[1:-1], examples):
            length = len(builder.answer(example.answer)) + 1  # and the new line after it
            sequence += [segment.ids]
            end = len(segments[0].ids) + sum(map(len, sequence))
            spans.append((end - length, end - 1))
        ids = np.concatenate([np.array(s.ids) for s in segments] + [np.array(answer)])
        spans.append((len(ids) - len(answer), len(ids)))
        return ids, spans


def _pad(rows, value):
    out = np.full((len(rows), max(map(len, rows))), value, np.asarray(rows[0]).dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def answer_logits(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits at the answers' rows `[N, V]`, and the mask `[B, L]` of those rows."""
    core = model.model
    embeds = core.get_input_embeddings()(batch["input_ids"])
    images = core.visual(batch["pixel_values"], grid_thw=batch["grids"]).pooler_output
    where = (batch["input_ids"] == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(where, images.to(embeds.dtype))
    hidden = core.language_model(
        inputs_embeds=embeds, position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    rows = batch["turn"] >= 0
    return model.lm_head(hidden[rows]), rows


def loss_of(model, batch) -> torch.Tensor:
    """Mean cross-entropy in nats over the answers' tokens, weighted by turn."""
    logits, rows = answer_logits(model, batch)
    weights = batch["weights"][rows]
    losses = functional.cross_entropy(logits, batch["targets"][rows], reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)


@torch.inference_mode()
def exact_match(model, batches: Batches, turns: int, *, count: int = 400, style: str) -> float:
    """Share of queries whose every answer token is the arg-max, one-language sequences."""
    rng = np.random.default_rng(17)
    batch = batches.draw(count, turns, rng, style=style)
    logits, rows = answer_logits(model, batch)
    right = torch.ones_like(batch["targets"], dtype=torch.bool)
    right[rows] = logits.argmax(-1) == batch["targets"][rows]
    last = batch["turn"] == turns - 1
    return float((right | ~last).all(1).float().mean())


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < _WARMUP.value:
        return _RATE.value * (step + 1) / _WARMUP.value
    progress = (step - _WARMUP.value) / max(1, _STEPS.value - _WARMUP.value)
    return _RATE.value * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))


def save_state(path: pathlib.Path, model, optimizer, step: int) -> None:
    """Writes weights and AdamW's moments as safetensors, atomically."""
    tensors = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].clone()
    save_file(tensors, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load_state(path: pathlib.Path, model, optimizer) -> int:
    """Restores what `save_state` wrote; returns the step."""
    tensors = load_file(path)
    step = int(tensors["step"])
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight/{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{m: tensors[f"{m}/{name}"] for m in ("exp_avg", "exp_avg_sq")},
        }
    return step


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    torch.set_num_threads(_THREADS.value)
    torch.manual_seed(_SEED.value)
    out, workdir = pathlib.Path(_OUT.value), pathlib.Path(_WORKDIR.value)
    for folder in (out, workdir):
        folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    processor = Qwen2VLImageProcessorPil.from_pretrained(out, local_files_only=True)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE.value, weight_decay=0.05)
    state, log = workdir / "state.safetensors", workdir / "log.jsonl"
    first = load_state(state, model, optimizer) if state.exists() else 0
    train_rows, validation_rows = pretraining_rows()
    batches = Batches(tokenizer, processor, train_rows, _ONE_LANGUAGE.value, _FOLLOW_LAST.value)
    validation = Batches(tokenizer, processor, validation_rows, 1.0, 1.0)
    batch_equal_windows(model.model.visual)
    started, seconds_before = time.time(), 0.0
    for step in range(first, _STEPS.value):
        rng = np.random.default_rng([_SEED.value, step])
        turns = 1 + int(rng.choice(_MAX_DEMONSTRATIONS + 1, p=[0.08, 0.26, 0.3, 0.2, 0.16]))
        batch = batches.draw(_TURNS.value // turns, turns, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = loss_of(model, batch)
        if not torch.isfinite(loss):
            raise RuntimeError(f"step {step}: the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _EVERY.value == 0 or step + 1 == _STEPS.value:
            row = {
                "step": step + 1,
                "loss": round(loss.item(), 4),
                "seconds": round(seconds_before + time.time() - started, 1),
            }
            for style in _STYLES:
                for shots in (0, 1, 2, 4):
                    value = exact_match(model, validation, shots + 1, style=style)
                    row[f"{style}_{shots}_shots"] = round(value, 4)
            print(json.dumps(row), flush=True)
            with log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            save_state(state, model, optimizer, step + 1)
    _export(model, out, log)


def _export(model, out: pathlib.Path, log: pathlib.Path) -> None:
    """Writes the Hugging Face folder and how it was made."""
    model.save_pretrained(out, safe_serialization=True)
    made = {
        "command": "python -m experiments.pretrain_tiny_qwen "
        + " ".join(
            f"--{flag.name}={flag.value}"
            for flag in flags.FLAGS.get_key_flags_for_module("__main__")
            if flag.name not in ("threads",)
        ),
        "parameters": sum(p.numel() for p in model.parameters()),
        "log": [json.loads(line) for line in log.read_text().splitlines()],
    }
    (out / "pretraining.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
