"""How every entry point starts and ends: flags, one-line errors, Ctrl-C."""

import logging
import os
import sys

from absl import app, flags

from lever_jax.errors import InputError as PolicyInputError
from qwen_bridge.errors import InputError as BridgeInputError
from qwen_bridge.errors import ScorerError, WorkerError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def run(main, *, takes_arguments: bool = False) -> None:
    """Runs `main()` with parsed flags; bad input is one line and exit code 2, no traceback.

    With `takes_arguments` it is `main(arguments)`, the words that are no flags, and what it returns
    is the exit code. After Ctrl-C what was committed stays, and the same command resumes.
    """

    def guarded(argv):
        try:
            if takes_arguments:
                sys.exit(main(argv[1:]))
            if len(argv) > 1:
                raise BridgeInputError(f"unexpected argument {argv[1]!r}; flags begin with --")
            main()
        except (PolicyInputError, BridgeInputError) as error:
            _say(f"error: {error}")
            sys.exit(BAD_INPUT)
        except (WorkerError, ScorerError) as error:
            for note in getattr(error, "__notes__", []):  # Where in the worker it came from.
                _say(note)
            _say(f"error: {error}; what was finished is kept, and the same command goes on")
            sys.exit(FAILED)
        except KeyboardInterrupt:
            _say("stopped; what was finished is kept, and the same command goes on from there")
            # All is closed; but XLA may be compiling in a thread, and an exit would wait for it.
            logging.shutdown()
            os._exit(INTERRUPTED)

    app.run(guarded, flags_parser=_parse)


def _parse(argv):
    # JAX tells of every kind of accelerator that it does not find.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    # --help lists the flags of the main module: ours are its own, wherever they are defined.
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("experiments."):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        message = " ".join(str(error).split())
        _say(f"error: {message}; see --helpfull")
        sys.exit(BAD_INPUT)


def _say(line: str) -> None:
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def share_gpu() -> None:
    """Has JAX take GPU memory as it needs it, and no more than 30%: most of it is the VLM's.

    To be called before JAX is first used. What the user has set stays; JAX takes no GPU at all
    where both names of the share are set.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")
