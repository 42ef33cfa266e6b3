"""The fast scorer: shared prefixes computed once, answers as branches of one last forward.

Prompts that begin alike share keys and values (`prefix_cache.py`); a last forward runs the query
and all its answer branches over the cached prefix, with a small mask that lets each branch see
the prefix, the query and itself. The language head runs at answer rows only. All of it is exact:
the reference scorer gives the same numbers up to float rounding.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from qwen_bridge.known_outputs import KnownOutputs
from qwen_bridge.memory import HEAD_ROWS
from qwen_bridge.prefix_cache import PrefixCache, PrefixNode
from qwen_bridge.prompts import PromptError
from qwen_bridge.scorer import BranchScores, Generated, PromptRequest, PromptScorer
from qwen_bridge.segments import PreparedSegment
from qwen_bridge.trie import fitting_chunks, levels, token_batches

# A GPU wants large products; on a CPU activations beyond its caches cost more than they save.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of a forward pass: tokens after a cached prefix.

    Attributes:
      prefix: the nodes before the row.
      segments: the prompt segments that the row starts with.
      branches: token lists, each of which continues the last segment on its own.
    """

    prefix: Sequence[PrefixNode]
    segments: tuple[PreparedSegment, ...]
    branches: tuple[tuple[int, ...], ...] = ()

    @property
    def prefix_length(self) -> int:
        return sum(node.kv.shape[3] for node in self.prefix)

    @property
    def start(self) -> int:
        return self.prefix[-1].next_position if self.prefix else 0

    @property
    def after(self) -> int:
        """M-RoPE counter after the segments."""
        return self.start + sum(segment.advance for segment in self.segments)

    @property
    def trunk(self) -> int:
        """Tokens of the segments."""
        return sum(map(len, self.segments))

    def __len__(self) -> int:
        return self.trunk + sum(map(len, self.branches))


class TrieScorer(PromptScorer):
    """Scores prompts over a trie of shared prefixes; see `PromptScorer` for the arguments.

    Args:
      batch_tokens: tokens of a forward pass, padding included; None by device.
      cache_bytes: memory that prefixes may take, those in use included.
      known_outputs: how many outputs that a query has given are tried as branches when another
        of its prompts is scored, so that wrong answers can be certified too; 0 tries none.
    """

    def __init__(
        self,
        *args,
        batch_tokens: int | None = None,
        cache_bytes: int = 1 << 30,
        known_outputs: int = 4,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        self.cache = PrefixCache(cache_bytes)
        self.known = KnownOutputs(known_outputs)
        self._image_token = self.factory.builder.image_token
        text = self.model.config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        values = 2 * text.num_hidden_layers * text.num_key_value_heads * width
        self._token_bytes = values * self.dtype.itemsize

    def _score_branches(self, requests: list[PromptRequest]) -> list[BranchScores | PromptError]:
        return self._by_chunks(requests, self._score_chunk)

    def _generate(self, requests: list[PromptRequest]) -> list[Generated | PromptError]:
        return self._by_chunks(requests, self._generate_chunk)

    def _known_outputs(self, query_id: int) -> tuple[tuple[int, ...], ...]:
        return self.known.of(query_id)

    def limits(self) -> tuple[int, ...]:
        """See the base class."""
        return (*super().limits(), self._batch_tokens, self.cache.budget)

    def set_limits(self, limits: tuple[int, ...]) -> None:
        """See the base class."""
        *rest, self._batch_tokens, self.cache.budget = limits
        super().set_limits(tuple(rest))

    def shrink(self) -> bool:
        """See the base class."""
        if self.cache.bytes > self.cache.budget // 2:  # It may have been what filled the memory.
            self.cache.budget //= 2
        if super().shrink():
            return True
        self._batch_tokens = max(1, self._batch_tokens // 2)
        return False

    def empty_caches(self) -> None:
        """See the base class."""
        self.cache.clear()
        super().empty_caches()

    @torch.inference_mode()
    def _by_chunks(self, requests: list[PromptRequest], run: Callable[[list], list]) -> list:
        """Runs requests in chunks whose prefixes fit the budget; refuses those that never do."""
        sizes = {
            request.path[:depth]: len(request.segments[depth]) * self._token_bytes
            for request in requests
            for depth in range(len(request.path) + 1)
        }
        budget = self.cache.budget
        chunks, too_large = fitting_chunks([r.path for r in requests], sizes, budget)
        results: list = [None] * len(requests)
        for i, wanted in too_large.items():
            results[i] = PromptError(
                f"the prefix of this prompt takes {wanted / 2**20:.1f} MiB, more than the "
                f"{budget / 2**20:.1f} MiB for cached prefixes; raise --cache_mib"
            )
        for chunk in chunks:
            for i, result in zip(chunk, run([requests[i] for i in chunk])):
                results[i] = result
        return results

    def _score_chunk(self, requests: list[PromptRequest]) -> list[BranchScores]:
        rows = self._prompt_rows(requests, branches=True)
        results: list[BranchScores | None] = [None] * len(rows)
        for batch in self._batches(rows):
            hidden, _ = self._forward([rows[i] for i in batch])
            scored = self._read_branches(
                hidden, [rows[i] for i in batch], [requests[i].forms for i in batch]
            )
            for i, scores in zip(batch, scored):
                results[i] = scores
        return results

    def _generate_chunk(self, requests: list[PromptRequest]) -> list[Generated]:
        rows = self._prompt_rows(requests, branches=False)
        results: list[Generated | None] = [None] * len(rows)
        for batch in self._batches(rows):
            for i, generated in zip(batch, self._decode([rows[i] for i in batch])):
                results[i] = generated
        for request, generated in zip(requests, results):
            if generated.tokens[-1] == self.end_of_turn:
                self.known.add(request.query.id, generated.tokens)
        return results

    def _batches(self, rows: list[Row]) -> list[list[int]]:
        return token_batches(
            [len(row) for row in rows], self._batch_tokens, [row.prefix_length for row in rows]
        )

    def _prompt_rows(self, requests: list[PromptRequest], *, branches: bool) -> list[Row]:
        """The last forward of every prompt: its query, and its answers where wanted."""
        self._fill_cache(requests)
        return [
            Row(
                self.cache.path(request.path),
                (request.segments[-1],),
                inputs_of(request.forms) if branches else (),
            )
            for request in requests
        ]

    def _fill_cache(self, requests: list[PromptRequest]) -> None:
        """Computes the missing prefix nodes, level by level."""
        segments = {
            request.path[:depth]: request.segments[depth]
            for request in requests
            for depth in range(len(request.path) + 1)
        }
        missing = levels((request.path for request in requests), self.cache)
        wanted = [node for level in missing for node in level]
        self.cache.misses += len(wanted)
        self.cache.hits += len(segments) - len(wanted)
        self.cache.make_room(
            sum(len(segments[node]) for node in wanted) * self._token_bytes, segments.keys()
        )
        for level in missing:
            rows = [
                Row(self.cache.path(node[:-1]) if node else [], (segments[node],)) for node in level
            ]
            for batch in self._batches(rows):
                chosen = [rows[i] for i in batch]
                _, cache = self._forward(chosen)
                first = max(row.prefix_length for row in chosen)
                for place, i in enumerate(batch):
                    length = len(rows[i])
                    kv = torch.stack(
                        [
                            torch.stack([x[place, :, first : first + length] for x in (k, v)])
                            for k, v in _layers(cache)
                        ]
                    )
                    self.cache.put(level[i], PrefixNode(kv, rows[i].after))

    def _forward(self, rows: list[Row]) -> tuple[torch.Tensor, DynamicCache]:
        """Runs rows over their prefixes; returns hidden states `[B, Q, H]` and the cache."""
        width = max(len(row) for row in rows)
        ids = np.zeros((len(rows), width), np.int64)
        positions = np.zeros((3, len(rows), width), np.int64)
        for i, row in enumerate(rows):
            at, start = 0, row.start
            for segment in row.segments:
                ids[i, at : at + len(segment)] = segment.ids
                positions[:, i, at : at + len(segment)] = segment.positions + start
                at, start = at + len(segment), start + segment.advance
            for branch in row.branches:
                ids[i, at : at + len(branch)] = branch
                positions[:, i, at : at + len(branch)] = np.arange(len(branch)) + start
                at += len(branch)
        embeds = self._embed_rows(torch.from_numpy(ids).to(self.device), rows)
        past, prefix_lengths = self._gather_prefixes(rows)
        mask = self._additive(torch.from_numpy(_mask(rows, prefix_lengths, width)))
        out = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=torch.from_numpy(positions).to(self.device),
            attention_mask={"full_attention": mask},
            past_key_values=past,
            use_cache=True,
        )
        return out.last_hidden_state, out.past_key_values

    def _additive(self, mask: torch.Tensor) -> torch.Tensor:
        """0 where a token may look, -inf elsewhere: of bools, every layer would make this anew."""
        mask = mask.to(self.device)
        out = torch.zeros(mask.shape, dtype=self.dtype, device=self.device)
        return out.masked_fill_(~mask, float("-inf"))

    def _embed_rows(self, ids: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        embeds = self.model.model.get_input_embeddings()(ids)
        features, places = [], []
        for i, row in enumerate(rows):
            at = i * ids.shape[1]
            for segment in row.segments:
                if segment.image is not None:
                    features.append(segment.image)
                    places.append(np.arange(len(segment.image)) + at + segment.image_start)
                at += len(segment)
        if features:
            places = torch.from_numpy(np.concatenate(places)).to(ids.device)
            embeds.view(-1, embeds.shape[-1])[places] = torch.cat(features).to(embeds.dtype)
        return embeds

    def _gather_prefixes(self, rows: list[Row]) -> tuple[DynamicCache, list[int]]:
        """Lays the cached prefixes side by side, each padded on its right."""
        lengths = [row.prefix_length for row in rows]
        longest = max(lengths)
        if longest == 0:
            return DynamicCache(), lengths
        shape = rows[int(np.argmax(lengths))].prefix[0].kv.shape
        kv = torch.zeros(
            (*shape[:2], len(rows), shape[2], longest, shape[4]),
            dtype=self.dtype,
            device=self.device,
        )
        for i, row in enumerate(rows):
            at = 0
            for node in row.prefix:
                kv[:, :, i, :, at : at + node.kv.shape[3]] = node.kv
                at += node.kv.shape[3]
        return DynamicCache([(layer[0], layer[1]) for layer in kv]), lengths

    def _read_branches(self, hidden, rows, forms) -> list[BranchScores]:
        """Reads token log-probabilities and margins of every branch off the hidden states."""
        places, targets, counts = [], [], []
        for i, (row, row_forms) in enumerate(zip(rows, forms)):
            last, at = row.trunk - 1, row.trunk
            for form in row_forms:
                steps = len(form) - 1
                places += [(i, last)] + [(i, at + k) for k in range(steps)]
                targets += form
                counts.append(len(form))
                at += steps
        row, column = torch.tensor(places, device=self.device).T
        log_probs, margins = self._head(
            hidden[row, column], torch.tensor(targets, device=self.device)
        )
        bounds = np.cumsum([0, *counts])
        spans = iter([slice(a, b) for a, b in itertools.pairwise(bounds)])
        return [
            BranchScores.from_tokens([(log_probs[s], margins[s]) for _, s in zip(f, spans)])
            for f in forms
        ]

    def _head(self, hidden, targets) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability and margin of each target token, from float32 logits."""
        pieces = [
            self._head_rows(*piece)
            for piece in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS))
        ]
        return tuple(np.concatenate(column) for column in zip(*pieces))

    def _head_rows(self, hidden, targets) -> tuple[np.ndarray, np.ndarray]:
        logits = self.model.lm_head(hidden).float()
        chosen = logits.gather(1, targets[:, None])[:, 0]
        log_probs = chosen - logits.logsumexp(-1)
        others = logits.scatter(1, targets[:, None], float("-inf")).max(-1).values
        return log_probs.double().cpu().numpy(), (chosen - others).double().cpu().numpy()

    def _decode(self, rows: list[Row]) -> list[Generated]:
        """Greedy decoding of a batch from its cached prefixes."""
        hidden, cache = self._forward(rows)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        every = torch.arange(len(rows), device=self.device)
        last = hidden[every, lengths - 1]
        prefix = max(row.prefix_length for row in rows)
        width = prefix + hidden.shape[1]
        seen = torch.zeros(len(rows), width + self.max_new_tokens, dtype=torch.bool)
        for i, row in enumerate(rows):
            seen[i, : row.prefix_length] = True
            seen[i, prefix : prefix + len(row)] = True
        seen = self._additive(seen)
        position = torch.tensor([row.after for row in rows], device=self.device)
        tokens, log_probs = [], []
        done = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for step in range(self.max_new_tokens):
            step_log_probs = self.model.lm_head(last).float().log_softmax(-1)
            value, token = step_log_probs.max(-1)
            tokens.append(torch.where(done, -1, token))
            log_probs.append(torch.where(done, 0.0, value.double()))
            done = done | (token == self.end_of_turn)
            if step + 1 == self.max_new_tokens or bool(done.all()):
                break
            seen[:, width + step] = 0.0
            out = self.model.model.language_model(
                inputs_embeds=self.model.model.get_input_embeddings()(token)[:, None],
                position_ids=(position + step).expand(3, -1)[..., None],
                attention_mask={"full_attention": seen[:, None, None, : width + step + 1]},
                past_key_values=cache,
                use_cache=True,
            )
            last, cache = out.last_hidden_state[:, 0], out.past_key_values
        ids = torch.stack(tokens, 1).cpu().numpy()
        totals = torch.stack(log_probs, 1).sum(1).cpu().numpy()
        return [
            Generated(tuple(int(t) for t in row if t >= 0), float(total))
            for row, total in zip(ids, totals)
        ]


def inputs_of(forms) -> tuple[tuple[int, ...], ...]:
    """What of each answer enters the network: all but its last token, which is only predicted."""
    return tuple(form[:-1] for form in forms)


def _layers(cache: DynamicCache):
    """Yields keys and values `[B, heads, L, head_dim]` of each layer."""
    for layer in cache.layers:
        yield layer.keys, layer.values


def _mask(rows: list[Row], prefix_lengths: list[int], width: int) -> np.ndarray:
    """Which keys each token may see: bool `[B, 1, Q, P + Q]`.

    The prefix, its own segment causally, and of the branches only its own, causally. Padding
    sees itself, so that no row of the attention is empty.
    """
    prefix = max(prefix_lengths)
    mask = np.zeros((len(rows), 1, width, prefix + width), bool)
    diagonal = np.arange(width)
    mask[:, 0, diagonal, prefix + diagonal] = True
    for i, row in enumerate(rows):
        own = mask[i, 0]
        length = row.trunk
        own[: len(row), : prefix_lengths[i]] = True
        own[:length, prefix : prefix + length] = np.tri(length, dtype=bool)
        own[length : len(row), prefix : prefix + length] = True
        at = length
        for branch in row.branches:
            end = at + len(branch)
            own[at:end, prefix + at : prefix + end] = np.tri(len(branch), dtype=bool)
            at = end
    return mask
