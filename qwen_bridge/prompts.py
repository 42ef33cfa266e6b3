"""The one prompt builder: demonstrations and a query become token segments.

Scoring, generation, evaluation, warm-up and the pretraining of the embedded model all build
their prompts here and nowhere else. A prompt is a list of *segments* (system, one for each
demonstration, query); segments are tokenised apart, at special tokens, so that equal prefixes of
two prompts are equal lists of tokens and can be computed once.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

from qwen_bridge.errors import InputError
from qwen_bridge.recent import RecentlyUsed

STYLES = ("chat", "inline")
SYSTEM = "You are a helpful assistant."
_TEXTS_KEPT = 1 << 16  # as tokens


class PromptError(Exception):
    """This one prompt cannot be built; the message says why. It becomes `eval_failed`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that holds at most one image.

    Attributes:
      ids: token ids; the image is a single `<|image_pad|>`, expanded once its grid is known.
      image: key of the image, or None.
    """

    ids: tuple[int, ...]
    image: str | None = None


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """How demonstrations and a query are laid out.

    Attributes:
      style: `chat` makes each demonstration a user turn (image, question) and an assistant turn
        (answer); `inline` puts everything into one user turn, `Question: ... Short answer: ...`.
      instruction: appended to every question on a line of its own; empty for none.
    """

    style: str = "chat"
    instruction: str = ""

    def __post_init__(self):
        if self.style not in STYLES:
            raise InputError(f"--prompt_style={self.style} is not one of {', '.join(STYLES)}")

    @property
    def hash(self) -> str:
        """Identifies the template; stored with every score."""
        text = repr((self.style, self.instruction, SYSTEM, _LAYOUT_VERSION))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_LAYOUT_VERSION = 1  # raise when the token sequence of any prompt changes


class PromptBuilder:
    """Turns text into segments with one tokenizer and one template.

    Args:
      tokenizer: a Hugging Face tokenizer with Qwen's special tokens.
      template: the layout.

    Raises:
      InputError: the tokenizer lacks one of Qwen's special tokens.
    """

    def __init__(self, tokenizer, template: PromptTemplate):
        self.template = template
        self._tokenizer = tokenizer
        self._special = {
            name: self._special_id(f"<|{name}|>")
            for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad")
        }
        self._all_special = frozenset(tokenizer.added_tokens_encoder.values())
        self._text_cache = RecentlyUsed(_TEXTS_KEPT)
        image = tuple(self._special[name] for name in ("vision_start", "image_pad", "vision_end"))
        self._image = image
        start, end = (self._special["im_start"],), (self._special["im_end"],)
        newline = self._text("\n")
        self._user = start + self._text("user\n")
        self._end_user = end + newline
        self._assistant = start + self._text("assistant\n")
        self._system = start + self._text(f"system\n{SYSTEM}") + end + newline

    @property
    def end_of_turn(self) -> int:
        """The token that ends an answer: `<|im_end|>`."""
        return self._special["im_end"]

    @property
    def image_token(self) -> int:
        """The placeholder of an image: `<|image_pad|>`."""
        return self._special["image_pad"]

    def segments(self, demonstrations: Sequence, query) -> list[Segment]:
        """Lays out a prompt, up to where the answer begins.

        Args:
          demonstrations: examples in the order shown, each with `image`, `question`, `answer`.
          query: the example to answer; its answers are not looked at.

        Returns:
          One segment for the system turn, one a demonstration, one for the query.

        Raises:
          PromptError: a text holds a special token, or a demonstration has no answer.
        """
        if self.template.style == "chat":
            return [
                Segment(self._system),
                *(self._chat_demonstration(shown) for shown in demonstrations),
                Segment(
                    self._user + self._question(query) + self._end_user + self._assistant,
                    query.image,
                ),
            ]
        first = Segment(self._system + self._user)
        shown = [
            Segment(
                self._image + self._text(f"{self._inline(d)} {self._shown_answer(d)}\n"), d.image
            )
            for d in demonstrations
        ]
        last = self._image + self._text(self._inline(query)) + self._end_user + self._assistant
        return [first, *shown, Segment(last, query.image)]

    def answer(self, text: str) -> tuple[int, ...]:
        """Returns the tokens of an answer, the end of the turn included.

        Raises:
          PromptError: the answer is empty or holds a special token.
        """
        if not text:
            raise PromptError("an answer is empty")
        return self._text(text) + (self._special["im_end"],)

    def text(self, text: str) -> tuple[int, ...]:
        """Returns the tokens of plain text, outside any prompt (for embeddings).

        Raises:
          PromptError: the text holds a special token.
        """
        return self._text(text)

    def _chat_demonstration(self, example) -> Segment:
        ids = self._user + self._question(example) + self._end_user + self._assistant
        return Segment(
            ids + self.answer(self._shown_answer(example)) + self._text("\n"), example.image
        )

    def _shown_answer(self, example) -> str:
        if not example.answer.strip():
            raise PromptError(f"demonstration {example.id} has an empty answer")
        return example.answer.strip()

    def _question(self, example) -> tuple[int, ...]:
        return self._image + self._text(self._with_instruction(example.question.strip()))

    def _inline(self, example) -> str:
        return f"Question: {self._with_instruction(example.question.strip())} Short answer:"

    def _with_instruction(self, question: str) -> str:
        instruction = self.template.instruction
        return f"{question}\n{instruction}" if instruction else question

    def _text(self, text: str) -> tuple[int, ...]:
        ids = self._text_cache.get(text)
        if ids is None:
            ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if self._all_special.intersection(ids):
                raise PromptError(f"the text {text[:60]!r} holds a special token of the model")
            self._text_cache.put(text, ids, 1)
        return ids

    def _special_id(self, token: str) -> int:
        found = self._tokenizer.added_tokens_encoder.get(token)
        if found is None:
            raise InputError(
                f"--model: the tokenizer has no {token}; a Qwen2.5-VL checkpoint folder is needed"
            )
        return found
