"""The choices of a selector's architecture."""

import dataclasses
from typing import Any

from lever_jax.errors import InputError

HISTORIES = ("none", "gate", "gru", "attention")
POINTER_SCORES = ("dot", "bilinear", "additive")
SIZE = ("width", "layers", "heads")


@dataclasses.dataclass(frozen=True)
class SelectorConfig:
    """Size and options of the selector; it goes into checkpoints.

    With state s, a candidate read by the set encoder as r_a, and learned W, U, v of each line:

    Attributes:
      width: of tokens and state; a multiple of `heads`.
      layers: self-attention blocks of the set encoder; 0 leaves only the short paths.
      heads: of each block, and of the attention over picks.
      history: how a pick changes the state.
        none: it stays as the query set it; only what was picked is taken away.
        gate: a gated sum, s + sigmoid(W r_a + U s) * tanh(V r_a).
        gru: a gated recurrent unit with input r_a.
        attention: s_0 + attention of s_0 over all picks so far, in which older picks lose a
          learned amount of each head's score for every pick after them, so that order counts.
      pointer_score: how the state is compared with the candidates, beside the short paths.
        dot: (W s) . (U r_a), both projected, with biases.
        bilinear: s . W r_a, one matrix and no biases.
        additive: v . tanh(W s + U r_a).
      diversity: whether a candidate loses a learned multiple >= 0 of its largest cosine
        similarity to a pick so far, in the space of the projected embeddings.
      stop: whether the policy has an end (`lever_jax.actions`), with a logit read off the state.
      dropout: share of what the set encoder's blocks add that supervised and RCE steps leave out,
        in [0, 1); sampling, evaluation and GRPO, whose ratio compares with sampling, have none.
    """

    width: int = 64
    layers: int = 1
    heads: int = 4
    history: str = "gru"
    pointer_score: str = "dot"
    diversity: bool = False
    stop: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        for name, least in (("width", 1), ("layers", 0), ("heads", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}={getattr(self, name)}; give {least} or more")
        if self.width % self.heads:
            raise InputError(
                f"--width={self.width} is not a multiple of --heads={self.heads}; "
                f"try --width={self.heads * -(-self.width // self.heads)}"
            )
        for name, allowed in (("history", HISTORIES), ("pointer_score", POINTER_SCORES)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"--{name}={getattr(self, name)} is not one of {', '.join(allowed)}"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"--dropout={self.dropout}; give 0 or more and less than 1")
        if self.dropout and not self.layers:
            raise InputError(
                f"--dropout={self.dropout} is of the set encoder, which --layers=0 leaves out"
            )

    def recipe(self) -> dict[str, Any]:
        """What decides the selector: the size, and the options that are not at their defaults.

        So an option that is new leaves the recipes of earlier runs as they were.
        """
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k in SIZE or v != getattr(SelectorConfig, k)}

    def check_same(self, stored: dict[str, Any], place: str) -> None:
        """Refuses parameters of another architecture, naming what differs; dropout may.

        Args:
          stored: fields of the config that the parameters were made with.
          place: of the parameters, for the message.

        Raises:
          InputError: an option differs.
        """
        theirs = dataclasses.asdict(SelectorConfig(**stored))
        for name, own in dataclasses.asdict(self).items():
            if name != "dropout" and theirs[name] != own:
                raise InputError(
                    f"{place} holds a selector with {name}={theirs[name]}, not {name}={own}; "
                    "use the flags it was trained with"
                )
